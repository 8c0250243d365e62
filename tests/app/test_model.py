"""Models get the head that the data asks for, and train with it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import BertTokenizer

import tsd_jax as tsd
from configs import minilm_sst2
from tests.helpers.encoders import PUBLISHED, write_encoder
from tests.helpers.program import train
from tsd_jax import huggingface
from tsd_jax.app.model import with_head, with_tokens
from tsd_jax.app.run import execute
from tsd_jax.app.task import DataSettings
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


def small_config(base, data, **changes):
    config = minilm_sst2.get_config()
    config.mesh = (2, 2, 2)
    config.cache_dir = "off"
    config.model.path = str(base)
    config.data.path = str(data)
    config.data.eval_path = ""
    config.data.length = 10
    config.adapter.rank = 2
    config.adapter.directions = 2
    config.eval.batch_size = 8
    config.method.launch_step = 8
    config.optimizer.warmup = 0
    config.optimizer.learning_rate = 2e-2
    config.train.batch_size = 16
    config.train.micro_batches = 2
    config.train.steps = 24
    with config.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            setattr(config[section] if section else config, name, value)
    return config


def test_a_fresh_head_trains_beside_the_adapters(base, data, tmp_path, capsys):
    workdir = tmp_path / "run"
    pattern = "layers/(attention/self/query|output/dense)/kernel"
    config = small_config(base, data, adapter__pattern=pattern)
    run = train.prepare(config, workdir)
    told = capsys.readouterr().out
    assert "classification (bad, good); started at random: classifier/bias" in told
    assert "58 items to train on, 6 held out" in told
    heads = ["classifier/bias", "classifier/kernel"]
    heads += ["pooler/dense/bias", "pooler/dense/kernel"]
    assert [part.path for part in run.spec.full] == heads
    execute(run)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["launch_step"] == 8
    assert summary["after"].keys() == {"accuracy", "f1", "matthews", "loss", "count"}
    assert summary["after"]["count"] == 6
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert rows[-1]["step"] == 24
    assert rows[-1]["loss"] < 0.4 < 0.5 < rows[0]["loss"]  # log 2 is 0.69
    noted = json.loads((workdir / "config.json").read_text())["labels"]
    assert noted == {"problem": "classification", "count": 2, "names": ["bad", "good"]}
    saved = tsd.load_adapter(workdir / "adapter.safetensors")
    adapter = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"
    assert adapter["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    tensors = load_file(workdir / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.classifier.weight"],
        np.asarray(saved.trainable.full["classifier/kernel"].value).T,
    )


def test_the_default_rule_finds_the_modules_of_the_paper(base, data, tmp_path):
    run = train.prepare(small_config(base, data), tmp_path / "run")
    modules = ("attention/output/dense", "attention/self/key", "attention/self/query")
    modules += ("attention/self/value", "intermediate/dense", "output/dense")
    assert run.spec.paths == tuple(f"layers/{each}/kernel" for each in modules)


def settings(kind="classification", path="", problem=""):
    return DataSettings(
        kind=kind,
        path=str(path),
        eval_path="",
        problem=problem,
        held_out=0.1,
        template="alpaca",
        length=8,
        train_on_prompt=False,
        seed=0,
    )


@pytest.fixture
def headed(tmp_path):
    """A BERT whose head tells bad, good and odd apart."""
    write_encoder(tmp_path, PUBLISHED["bert"])
    return huggingface.read_config(tmp_path)


def test_a_head_takes_the_labels_of_the_data(base, data):
    config, labels = with_head(huggingface.read_config(base), settings(path=data))
    assert labels == Labels("classification", 2, ("bad", "good"))
    assert (config.num_labels, config.label_names) == (2, ("bad", "good"))


def test_labels_that_the_head_knows_keep_its_order(headed, data):
    turned = dataclasses.replace(headed, label_names=("good", "odd", "bad"))
    config, labels = with_head(turned, settings(path=data))
    assert labels is not None
    assert labels.names == config.label_names == ("good", "odd", "bad")


def test_another_head_is_started_only_when_asked_for(headed, data):
    other = dataclasses.replace(headed, label_names=("x", "y", "z"))
    with pytest.raises(InputError, match=r"\(x, y, z\).*\(bad, good\).*new_head=True"):
        with_head(other, settings(path=data))
    config, _ = with_head(other, settings(path=data), new=True)
    assert (config.num_labels, config.label_names) == (2, ("bad", "good"))
    generic = ("LABEL_0", "LABEL_1")
    plain = dataclasses.replace(headed, num_labels=2, label_names=generic)
    config, _ = with_head(plain, settings(path=data))
    assert config.label_names == ("bad", "good")  # names that say nothing give way


def test_models_and_data_that_do_not_fit_are_refused(headed, data):
    with pytest.raises(InputError, match=r"needs an encoder \(bert.*is a llama"):
        with_head(LLAMA, settings(path=data))
    with pytest.raises(InputError, match="new_head: a llama has no such head"):
        with_head(LLAMA, settings("text"), new=True)
    with pytest.raises(InputError, match="is a bert, an encoder, which writes no text"):
        with_head(headed, settings("text", data))
    assert with_head(LLAMA, settings("text")) == (LLAMA, None)


def test_an_encoder_learns_no_new_tokens(headed):
    with pytest.raises(InputError, match=r"model\.added_tokens: a bert"):
        with_tokens(headed, None, ("<a>",))
    assert with_tokens(headed, None, ()) == (headed, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__train_head": False}, "classifier/.*starts at random.*train_head"),
        ({"eval__metric": "nll"}, "'nll' does not serve data.kind 'classification'"),
        (
            {"data__length": 99},
            "99 tokens are longer than the 40 positions",
        ),
        ({"data__problem": "regression"}, "'bad' is not a number"),
        ({"adapter__pattern": ".*"}, "embeddings"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_reads_weights(
    base, data, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        train.prepare(small_config(base, data, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
