from __future__ import annotations

import json

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.config import config_json, read_config
from tsd_jax.models.config import DecoderConfig

FULL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "torch_dtype": "float32",
}
CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=128,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
)


def written(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_every_field_is_read(tmp_path):
    assert read_config(written(tmp_path, FULL)) == CONFIG


def test_what_is_written_is_read_back(tmp_path):
    assert read_config(written(tmp_path, config_json(CONFIG, "float32"))) == CONFIG


def test_an_old_file_says_less(tmp_path):
    sizes = ("hidden_size", "intermediate_size", "vocab_size")
    sizes += ("num_hidden_layers", "num_attention_heads", "model_type")
    old = {name: FULL[name] for name in sizes} | {"rope_scaling": None}
    config = read_config(written(tmp_path, old))
    assert config == DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=2048,
    )


def test_a_new_file_keeps_rope_theta_deeper(tmp_path):
    new = {name: value for name, value in FULL.items() if name != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    assert read_config(written(tmp_path, new)).rope_theta == 123.0


def test_an_integer_will_do_for_a_float(tmp_path):
    assert read_config(written(tmp_path, FULL | {"rope_theta": 7})).rope_theta == 7


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"rope_scaling": {"type": "linear"}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": "512"}, "vocab_size"),
        ({"vocab_size": 512.0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"head_dim": None, "num_attention_heads": 12}, "lacks 'head_dim'"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, change, named):
    with pytest.raises(InputError, match=named) as caught:
        read_config(written(tmp_path, FULL | change))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[1]", "\x80"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json is not"):
        read_config(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json \(No such file"):
        read_config(tmp_path)
