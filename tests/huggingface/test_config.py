from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.decoders import PUBLISHED
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


def other(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture], **more}


def llama(**changes: Any) -> dict[str, Any]:
    return PUBLISHED["llama"] | changes


def scaled(family: str = "llama", /, **scaling: Any) -> dict[str, Any]:
    return PUBLISHED[family] | {"rope_scaling": scaling}


LISTS = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
SEVERAL = {"full_attention": "x", "sliding_attention": {"rope_type": "default"}}
TEXT = {"model_type": "gemma3_text"}
AWAY = "choose another checkpoint"
CORRECT = "correct the model's config"

# {what: (config.json, what the line names, the way out)}
CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": (other("gpt2", "GPT2LMHeadModel", n_embd=8), "'gpt2'", AWAY),
    "llama4": (other("llama4", "Llama4ForConditionalGeneration"), "'llama4'", AWAY),
    "deepseek": (other("deepseek_v3", "DeepseekV3ForCausalLM"), "deepseek_v3", AWAY),
    "qwen2-vl": (
        other("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        "'qwen2_vl'",
        AWAY,
    ),
    "gemma3 with vision": (
        other("gemma3", "Gemma3ForConditionalGeneration", text_config=TEXT),
        "'gemma3'",
        "save its text model, a gemma3_text",
    ),
    "gptq": (llama(quantization_config={"quant_method": "gptq"}), "'gptq'", "original"),
    "unnamed quantization": (
        llama(quantization_config={"bits": 4}),
        "{'bits': 4}",
        "original",
    ),
    "mrope": (scaled("qwen2", type="mrope"), "'mrope'", AWAY),
    "phi3 dynamic": (scaled("phi3", type="dynamic", factor=2.0), "'dynamic'", AWAY),
    "phi3 linear": (scaled("phi3", type="linear", factor=2.0), "'linear'", AWAY),
    "longrope of no length": (
        scaled("phi3", type="longrope", **LISTS)
        | {"original_max_position_embeddings": 1},
        "original_max_position_embeddings",
        CORRECT,
    ),
    "dynamic of one pair": (
        scaled(type="dynamic", factor=2.0) | {"head_dim": 2},
        "dynamic needs heads",
        CORRECT,
    ),
    "yarn of one wavelength": (
        scaled(type="yarn", factor=2.0) | {"rope_theta": 1.0},
        "rope_theta",
        CORRECT,
    ),
    "llama3 without a span": (
        scaled(**PUBLISHED["llama"]["rope_scaling"] | {"low_freq_factor": 4.0}),
        "high_freq_factor 4.0",
        CORRECT,
    ),
    "an endless theta": (llama(rope_theta=float("inf")), "rope_theta", CORRECT),
    "gemma3 settings": (
        PUBLISHED["gemma3_text"] | {"rope_parameters": SEVERAL},
        "full_attention is 'x'",
        AWAY,
    ),
    "gemma3 in part": (
        PUBLISHED["gemma3_text"] | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor",
        AWAY,
    ),
    "a number in quotes": (llama(rms_norm_eps="1e-5"), "'1e-5'", CORRECT),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_the_line_names_the_fault_and_the_way_out(tmp_path, what):
    content, named, way_out = CONFIGS[what]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_config(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/config.json: ")
    assert named in line
    assert way_out in line
    assert "\n" not in line
