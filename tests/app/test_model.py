"""Models get the head that the data asks for, and train with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import BertTokenizer

import tsd_jax as tsd
from configs import minilm_sst2
from tests.helpers.demo_runs import changed, metrics, small_settings, summary
from tests.helpers.encoders import PUBLISHED, write_encoder
from tsd_jax import huggingface
from tsd_jax.app.build import prepare
from tsd_jax.app.config import settings_from
from tsd_jax.app.data import read_files
from tsd_jax.app.model import with_head, with_tokens
from tsd_jax.app.run import run
from tsd_jax.app.settings import DataSettings
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.models.config import DecoderConfig

LLAMA = DecoderConfig(8, 4, 4, 1, 1, 1, 4)
WORDS = [f"w{number}" for number in range(62)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small BERT without a classifier, and a tokenizer of its vocabulary."""
    folder = tmp_path_factory.mktemp("bert")
    headless = {"architectures": ["BertModel"], "num_hidden_layers": 2}
    write_encoder(folder, PUBLISHED["bert"] | headless)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    table = {word: number for number, word in enumerate(vocab)}
    BertTokenizer(vocab=table).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences that are good where w7 is among them."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(64):
        words = [WORDS[n] for n in rng.integers(8, 62, size=rng.integers(2, 7))]
        words += ["w7"] * (number % 2)
        label = ("bad", "good")[number % 2]
        rows.append({"sentence": " ".join(rng.permutation(words)), "label": label})
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(rows))
    return file


SMALL = {
    "mesh": (2, 2, 2),
    "cache_dir": "off",
    "data__eval_path": "",
    "data__length": 10,
    "adapter__rank": 2,
    "adapter__directions": 2,
    "eval__batch_size": 8,
    "method__launch_step": 8,
    "optimizer__warmup": 0,
    "optimizer__learning_rate": 2e-2,
    "train__batch_size": 16,
    "train__micro_batches": 2,
    "train__steps": 24,
}


def encoder_settings(base, data, **changes):
    files = {"model__path": str(base), "data__path": str(data)}
    config = minilm_sst2.get_config().to_dict()
    return settings_from(changed(config, SMALL | files | changes))


def test_a_fresh_head_trains_beside_the_adapters(base, data, tmp_path, capsys):
    workdir = tmp_path / "run"
    pattern = "layers/(attention/self/query|output/dense)/kernel"
    assert run(encoder_settings(base, data, adapter__pattern=pattern), workdir) == 0
    told = capsys.readouterr().out
    assert "classification (bad, good); started at random: classifier/bias" in told
    assert "58 items to train on, 6 held out" in told
    assert summary(workdir)["launch_step"] == 8
    after = summary(workdir)["after"]
    assert after.keys() == {"accuracy", "f1", "matthews", "loss", "count"}
    assert after["count"] == 6
    rows = [row for row in metrics(workdir) if row["kind"] == "train"]
    assert rows[-1]["step"] == 24
    assert rows[-1]["loss"] < 0.4 < 0.5 < rows[0]["loss"]  # log 2 is 0.69
    noted = json.loads((workdir / "config.json").read_text())["labels"]
    assert noted == {
        "problem": "classification",
        "count": 2,
        "names": ["bad", "good"],
        "positive": 1,
    }
    saved = tsd.load_adapter(workdir / "adapter.safetensors")
    assert [param.path for param in saved.spec.full] == [
        *("classifier/bias", "classifier/kernel"),
        *("pooler/dense/bias", "pooler/dense/kernel"),
    ]
    adapter = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"
    assert adapter["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    tensors = load_file(workdir / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.classifier.weight"],
        np.asarray(saved.trainable.full["classifier/kernel"].value).T,
    )


def test_the_default_rule_finds_the_modules_of_the_paper(base, data):
    prepared = prepare(encoder_settings(base, data))
    modules = ("attention/output/dense", "attention/self/key", "attention/self/query")
    modules += ("attention/self/value", "intermediate/dense", "output/dense")
    assert prepared.spec.paths == tuple(f"layers/{each}/kernel" for each in modules)


def files(path, kind="classification"):
    settings = DataSettings(
        kind=kind,
        path=str(path),
        eval_path="",
        problem="",
        positive="",
        held_out=0.1,
        template="alpaca",
        length=8,
        train_on_prompt=False,
    )
    return read_files(settings, seed=0)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words " * 30)
    return files(file, "text")


@pytest.fixture
def headed(tmp_path):
    """A BERT whose head tells bad, good and odd apart."""
    write_encoder(tmp_path, PUBLISHED["bert"])
    return huggingface.read_config(tmp_path)


def test_a_head_takes_the_labels_of_the_data(base, data):
    config, labels = with_head(huggingface.read_config(base), files(data))
    assert labels == Labels("classification", 2, ("bad", "good"))
    assert (config.num_labels, config.label_names) == (2, ("bad", "good"))


def test_labels_that_the_head_knows_keep_its_order(headed, data):
    turned = dataclasses.replace(headed, label_names=("good", "odd", "bad"))
    config, labels = with_head(turned, files(data))
    assert labels is not None
    assert labels.names == config.label_names == ("good", "odd", "bad")


def test_another_head_is_started_only_when_asked_for(headed, data):
    other = dataclasses.replace(headed, label_names=("x", "y", "z"))
    with pytest.raises(InputError, match=r"\(x, y, z\).*\(bad, good\).*new_head=True"):
        with_head(other, files(data))
    config, _ = with_head(other, files(data), new=True)
    assert (config.num_labels, config.label_names) == (2, ("bad", "good"))
    generic = ("LABEL_0", "LABEL_1")
    plain = dataclasses.replace(headed, num_labels=2, label_names=generic)
    config, _ = with_head(plain, files(data))
    assert config.label_names == ("bad", "good")  # names that say nothing give way


def test_models_and_data_that_do_not_fit_are_refused(headed, data, text):
    with pytest.raises(InputError, match=r"needs an encoder \(bert.*is a llama"):
        with_head(LLAMA, files(data))
    with pytest.raises(InputError, match="new_head: a llama has no such head"):
        with_head(LLAMA, text, new=True)
    with pytest.raises(InputError, match="is a bert, an encoder, which writes no text"):
        with_head(headed, text)
    assert with_head(LLAMA, text) == (LLAMA, None)


def test_an_encoder_learns_no_new_tokens(headed):
    with pytest.raises(
        InputError, match=r"model\.added_tokens: the vocabulary of a bert"
    ):
        with_tokens(headed, None, ("<a>",))
    assert with_tokens(headed, None, ()) == (headed, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__train_head": False}, "classifier/.*starts at random.*train_head"),
        (
            {"eval__metric": "nll"},
            "'nll' cannot be computed of data.kind 'classification'",
        ),
        (
            {"data__length": 99},
            "99 tokens are longer than the 40 positions",
        ),
        ({"data__problem": "regression"}, "'bad' is not a number"),
        ({"adapter__pattern": ".*"}, "embeddings"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_reads_weights(
    base, data, changes, message
):
    with pytest.raises(InputError, match=message):
        prepare(encoder_settings(base, data, **changes))


def test_a_base_is_named_so_that_it_is_found_from_anywhere(monkeypatch):
    model = Path(small_settings().model.path)
    monkeypatch.chdir(model.parent)
    assert prepare(small_settings(model__path=model.name)).base.name == str(model)
