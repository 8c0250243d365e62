"""Encoders' files: what is read, started fresh, passed over, refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.encoders import PUBLISHED, write_encoder
from tsd_jax import huggingface
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.families.encoders import ENCODERS
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.models.encoder_config import REGRESSION, DisentangledConfig

WEIGHTS = "model.safetensors"


def read(folder, name, **changes):
    content = {**PUBLISHED[name], **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return huggingface.read_config(folder)


def test_every_family_has_a_small_model():
    found = {each["model_type"]: each["architectures"] for each in PUBLISHED.values()}
    assert found == {name: [each.architecture] for name, each in ENCODERS.items()}
    assert ENCODERS.items() <= FAMILIES.items()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("labels", [0, 3])
def test_what_is_written_is_read_back(tmp_path, name, labels):
    config = read(tmp_path, name)
    if not labels:
        config = dataclasses.replace(config, num_labels=0, label_names=())
    written = config_json(config, "float32")
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert huggingface.read_config(tmp_path) == config
    assert written["architectures"][0].endswith(
        "ForSequenceClassification" if labels else "Model"
    )


def test_the_labels_are_those_of_the_head(tmp_path):
    config = read(tmp_path, "bert")
    assert (config.num_labels, config.label_names) == (3, ("bad", "good", "odd"))
    assert read(tmp_path, "bert", architectures=["BertModel"]).num_labels == 0
    assert read(tmp_path, "bert", id2label=None, num_labels=5).num_labels == 5
    assert read(tmp_path, "bert", id2label=None).num_labels == 2
    one = read(tmp_path, "bert", id2label={"0": "score"})
    assert (one.num_labels, one.problem_type) == (1, REGRESSION)


def test_the_numbers_of_a_published_deberta(tmp_path):
    found = read(tmp_path, "deberta-v3", position_buckets=256, architectures=None)
    assert found.disentangled == DisentangledConfig(40, position_buckets=256)
    assert not found.absolute_positions
    assert found.convolution is None
    assert read(tmp_path, "deberta-v2").convolution.activation == "gelu"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"architectures": ["BertForTokenClassification"]}, "architectures"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("bert", {"vocab_size": None}, "lacks 'vocab_size'"),
        ("bert", {"id2label": {"1": "a", "2": "b"}}, "id2label"),
        (
            "roberta",
            {"problem_type": "multi_label_classification"},
            "problem_type is 'multi_label_classification'",
        ),
        ("deberta-v3", {"relative_attention": False}, "relative_attention is False"),
        (
            "deberta-v3",
            {"pos_att_type": "p2c|p2p"},
            r"pos_att_type is \['p2c', 'p2p'\]",
        ),
        ("deberta-v3", {"pos_att_type": None}, r"pos_att_type is \[\]"),
        ("deberta-v3", {"attention_head_size": 16}, "attention_head_size is 16"),
        ("deberta-v3", {"pooler_hidden_size": 16}, "pooler_hidden_size is 16"),
        ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size is 4"),
        ("deberta-v2", {"conv_act": "mish"}, "conv_act is 'mish'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, name, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A BERT, with what old files hold besides."""
    write_encoder(tmp_path, PUBLISHED["bert"])
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    save_file(edit(tensors), folder / WEIGHTS)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_old_names_buffers_and_heads_of_pretraining_are_known(folder):
    config = huggingface.read_config(folder)
    expected = huggingface.load_params(folder, config)

    def older(tensors):
        ends = {
            "LayerNorm.weight": "LayerNorm.gamma",
            "LayerNorm.bias": "LayerNorm.beta",
        }
        for new, old in ends.items():
            for name in [name for name in tensors if name.endswith(new)]:
                tensors[name.removesuffix(new) + old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
        tensors["cls.predictions.bias"] = np.zeros(67, np.float32)
        return tensors

    change(folder, older)
    assert_same(huggingface.load_params(folder, config), expected)


def test_a_file_without_prefix_is_read_and_its_pooler_kept(folder):
    config = huggingface.read_config(folder)
    expected = huggingface.load_params(folder, config)
    change(folder, lambda x: {n.removeprefix("bert."): each for n, each in x.items()})
    assert_same(huggingface.load_params(folder, config), expected)


def test_a_head_that_is_not_there_starts_fresh_by_the_key(folder):
    config = huggingface.read_config(folder)
    before = huggingface.load_params(folder, config)
    assert huggingface.absent_head(folder, config) == ()
    change(folder, lambda x: {n: each for n, each in x.items() if "classif" not in n})
    assert {*huggingface.absent_head(folder, config)} == {
        "classifier/kernel",
        "classifier/bias",
    }
    with pytest.raises(InputError, match=r"lacks tensor 'classifier\.bias'"):
        huggingface.load_params(folder, config)
    wide = dataclasses.replace(config, initializer_range=2.0)
    one, same, other = (
        huggingface.load_params(folder, wide, head_key=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert_same(one, same)
    kernel = one["classifier"].pop("kernel")
    assert np.std(kernel) == pytest.approx(2.0, rel=0.25)
    assert np.abs(kernel - other["classifier"]["kernel"]).max() > 0.1
    np.testing.assert_array_equal(one["classifier"].pop("bias"), 0)
    assert one.pop("classifier") == {}
    before.pop("classifier")
    assert_same(one, before)  # the pooler is the checkpoint's own


def test_a_head_that_is_there_is_read_whatever_the_key(folder):
    config = huggingface.read_config(folder)
    expected = huggingface.load_params(folder, config)
    key = jax.random.key(0)
    assert_same(huggingface.load_params(folder, config, head_key=key), expected)


def test_a_head_for_other_labels_is_refused(folder):
    config = huggingface.read_config(folder)
    two = dataclasses.replace(config, num_labels=2, label_names=())
    with pytest.raises(InputError, match=r"classifier\.\w+' .*shape \(3.*\(2"):
        huggingface.load_params(folder, two, head_key=jax.random.key(0))


def test_unknown_tensors_are_refused(folder):
    config = huggingface.read_config(folder)
    change(folder, lambda x: x | {"bert.adapter.weight": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match=r"holds tensor 'bert\.adapter\.weight'"):
        huggingface.load_params(folder, config)


def test_modules_have_the_names_of_torch():
    name = huggingface.module_name
    query = "layers/attention/self/query/kernel"
    assert name(query, 3, "bert") == "bert.encoder.layer.3.attention.self.query"
    assert name("layers_1/output/dense/bias", None, "roberta") == (
        "roberta.encoder.layer.1.output.dense"
    )
    assert name("pooler/dense/kernel", None, "bert") == "bert.pooler.dense"
    assert name("pooler/dense/kernel", None, "deberta-v2") == "pooler.dense"
    assert name("classifier/kernel", None, "bert") == "classifier"
    assert name("encoder/rel_embeddings/embedding", None, "deberta-v2") == (
        "deberta.encoder.rel_embeddings"
    )
