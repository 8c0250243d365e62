"""Small decoders of every family: config.json as published files have it, and weights.

Weights are random numbers that only depend on a tensor's name, so that two programs
fill the same model without exchanging it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tsd_jax.huggingface import abstract_params, names, read_config

_SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _published(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    base = {"architectures": [architecture], "model_type": model_type, **_SIZES}
    act = "hidden_activation" if "Gemma" in architecture else "hidden_act"
    return {**base, act: more.pop("act", "silu"), **more}


_GEMMA = {
    "act": "gelu_pytorch_tanh",
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "tie_word_embeddings": True,
}
_QWEN_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "decoder_sparse_step": 1,
}

PUBLISHED: Mapping[str, dict[str, Any]] = {
    "llama": _published(
        "LlamaForCausalLM",
        "llama",
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": _published(
        "MistralForCausalLM", "mistral", rms_norm_eps=1e-5, sliding_window=5
    ),
    "ministral": _published(
        "MinistralForCausalLM",
        "ministral",
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        head_dim=12,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mixtral": _published(
        "MixtralForCausalLM",
        "mixtral",
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_theta=1e6,
        sliding_window=None,
    ),
    "qwen2": _published(
        "Qwen2ForCausalLM",
        "qwen2",
        rope_theta=1e6,
        sliding_window=5,
        use_sliding_window=True,
        max_window_layers=2,
    ),
    "qwen3": _published(
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=10,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": _published(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        shared_expert_intermediate_size=28,
        norm_topk_prob=False,
        **_QWEN_EXPERTS,
    ),
    "qwen3_moe": _published(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        head_dim=10,
        norm_topk_prob=True,
        mlp_only_layers=[],
        **_QWEN_EXPERTS,
    ),
    "gemma2": _published(
        "Gemma2ForCausalLM",
        "gemma2",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_GEMMA,
    ),
    "gemma3_text": _published(
        "Gemma3ForCausalLM",
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=50.0,
        sliding_window_pattern=3,
        **_GEMMA,
    ),
    "phi3": _published(
        "Phi3ForCausalLM",
        "phi3",
        rms_norm_eps=1e-5,
        sliding_window=7,
        original_max_position_embeddings=64,
    ),
    "smollm3": _published(
        "SmolLM3ForCausalLM",
        "smollm3",
        no_rope_layers=[1, 1, 0, 1],
        rope_theta=5e6,
        tie_word_embeddings=True,
    ),
}


# Where goldens are kept: real tokens of all rows, past every window.
GOLDEN_COLUMNS = (9, 14, 17)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor of a trained size; scales of norms lie around a half."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    spread = 0.5 if "norm" in name else 1.0 if "embed" in name else 0.25
    mean = 0.5 if "norm" in name else 0.0
    return (spread * rng.standard_normal(shape) + mean).astype(np.float32)


def write_decoder(folder: Path, published: Mapping[str, Any]) -> None:
    """Write config.json and random weights, named as in the family's files."""
    write_model(folder, published, random_tensor)


def write_model(
    folder: Path,
    published: Mapping[str, Any],
    draw: Callable[[str, tuple[int, ...]], np.ndarray],
) -> None:
    """Write config.json, and the weights that `draw` returns for (name, shape)."""
    (folder / "config.json").write_text(json.dumps(published))
    config = read_config(folder)
    shapes = names.tensor_shapes(abstract_params(config), config.model_type)
    tensors = {name: draw(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def inputs(length: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, mask and positions (3, T): padded left, right, and not at all."""
    tokens = np.random.default_rng(0).integers(3, 67, size=(3, length))
    mask = np.ones(tokens.shape, bool)
    mask[0, : length // 3] = mask[1, -length // 4 :] = False
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return tokens, mask, positions + np.array([[0], [3], [30]])
