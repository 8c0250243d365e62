"""What the decoders do not compute is refused by name, before a weight is read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.decoders import PUBLISHED, write_decoder
from tsd_jax import huggingface
from tsd_jax.core.errors import InputError

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


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
        "dynamic scaling needs",
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
def test_configs(tmp_path, what):
    content, named, way_out = CONFIGS[what]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        huggingface.read_config(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/config.json: ")
    assert named in line
    assert way_out in line
    assert "\n" not in line


def without(tensors):
    del tensors[UP]


def with_another(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def turned(tensors):
    tensors[UP] = np.ascontiguousarray(tensors[UP].T)


def of_integers(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "named", "way_out"),
    [
        (without, f"lacks tensor '{UP}'", "fetch weights and config of one model"),
        (with_another, "holds tensor 'model.layers.0.self_attn.q_proj.bias'", "fetch"),
        (turned, f"tensor '{UP}' with shape (32, 48)", "config.json asks for (48, 32)"),
        (of_integers, f"tensor '{UP}' as I8", "use one of F64, F32, F16, BF16"),
    ],
)
def test_headers(tmp_path, change, named, way_out):
    write_decoder(tmp_path, PUBLISHED["llama"])
    config = huggingface.read_config(tmp_path)
    huggingface.check_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    for look in (huggingface.check_checkpoint, huggingface.load_params):
        with pytest.raises(InputError) as caught:
            look(tmp_path, config)
        line = str(caught.value)
        assert named in line
        assert way_out in line
        assert "\n" not in line


def test_a_tied_head_of_its_own(tmp_path):
    write_decoder(tmp_path, llama(tie_word_embeddings=True))
    config = huggingface.read_config(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    assert "lm_head" not in huggingface.load_params(tmp_path, config)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"lm_head.weight.*set that to false"):
        huggingface.load_params(tmp_path, config)
