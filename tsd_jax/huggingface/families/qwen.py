"""config.json of Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from tsd_jax.huggingface.families.common import (
    Values,
    experts_of,
    read_chosen_windows,
    read_rope,
    read_window,
    write_chosen_windows,
)
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.config import DecoderConfig, Experts


def read_qwen2(fields: Fields) -> Values:
    """Read the values that a Qwen 2 has beyond the common ones."""
    return read_rope(fields) | _read_last_windows(fields) | {"qkv_bias": True}


def read_qwen3(fields: Fields) -> Values:
    """Read the values that a Qwen 3 has beyond the common ones."""
    values = {
        "attention_bias": fields.get("attention_bias", bool, False),
        "qk_norm": True,
    }
    return read_rope(fields) | _read_last_windows(fields) | values


def write_qwen3(config: DecoderConfig) -> Values:
    """Return the entries that a Qwen 3 has beyond the common ones."""
    return {"attention_bias": config.attention_bias, **write_chosen_windows(config)}


def _read_last_windows(fields: Fields) -> Values:
    """Read the windows, presumably of the layers from `max_window_layers` on."""
    first = fields.get("max_window_layers", int)
    return read_chosen_windows(fields, lambda layer: layer >= first)


def _read_experts(fields: Fields, shared: int | None) -> Experts:
    """Read a mixture of experts, which every layer must have.

    Args:
      fields: of the config.json.
      shared: width of the shared expert; None for none.
    """
    dense = fields.get("mlp_only_layers", list, [])
    step = fields.get("decoder_sparse_step", int, 1)
    if dense:
        raise fields.refuse("mlp_only_layers", dense, "an empty list")
    if step != 1:
        raise fields.refuse("decoder_sparse_step", step, "1")
    # transformers 5 writes num_local_experts.
    number = fields.get("num_local_experts", int, None)
    return Experts(
        num_experts=fields.get("num_experts", int) if number is None else number,
        num_experts_per_tok=fields.get("num_experts_per_tok", int),
        intermediate_size=fields.get("moe_intermediate_size", int),
        norm_topk_prob=fields.get("norm_topk_prob", bool, False),
        shared_intermediate_size=shared,
    )


def _write_experts(config: DecoderConfig) -> Values:
    """Return the entries about a mixture of experts."""
    experts = experts_of(config)
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def read_qwen2_moe(fields: Fields) -> Values:
    """Read the values that a Qwen 2 with experts has beyond the common ones."""
    last = fields.get("max_window_layers", int)
    windows = read_chosen_windows(fields, lambda layer: layer % 2 == 0 and layer < last)
    shared = fields.get("shared_expert_intermediate_size", int)
    bias = fields.get("qkv_bias", bool, True)
    experts = _read_experts(fields, shared)
    return read_rope(fields) | windows | {"qkv_bias": bias, "experts": experts}


def write_qwen2_moe(config: DecoderConfig) -> Values:
    """Return the entries that a Qwen 2 with experts has beyond the common ones."""
    return {
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": experts_of(config).shared_intermediate_size,
        **_write_experts(config),
        **write_chosen_windows(config),
    }


def read_qwen3_moe(fields: Fields) -> Values:
    """Read the values that a Qwen 3 with experts has beyond the common ones."""
    values = read_rope(fields) | {
        "attention_bias": fields.get("attention_bias", bool, False),
        "qk_norm": True,
        "experts": _read_experts(fields, None),
    }
    used = fields.get("use_sliding_window", bool, False)
    return values | (read_window(fields) if used else {})


def write_qwen3_moe(config: DecoderConfig) -> Values:
    """Return the entries that a Qwen 3 with experts has beyond the common ones."""
    return {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        **_write_experts(config),
    }
