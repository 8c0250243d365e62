"""config.json of Gemma 2 and 3."""

from __future__ import annotations

from tsd_jax.huggingface.families.common import (
    UNWINDOWED,
    WINDOWED,
    Values,
    check_whole_heads,
    read_period,
    read_rope,
    read_scaling,
    read_windows,
    same_names,
    write_windows,
)
from tsd_jax.huggingface.families.fields import Fields, checked
from tsd_jax.models.config import DecoderConfig


def read_gemma(fields: Fields) -> Values:
    """Read the values that Gemma 2 and 3 share."""
    if fields.get("use_bidirectional_attention", bool, False):
        raise fields.refuse("use_bidirectional_attention", True, False)
    limits = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "hidden_act": fields.get("hidden_activation", str, "gelu_pytorch_tanh"),
        "attention_bias": fields.get("attention_bias", bool, False),
        "query_pre_attn_scalar": fields.get("query_pre_attn_scalar", float),
        **{name: fields.get(name, float, None) for name in limits},
        "norm_around_one": True,
        "post_norms": True,
        "scale_embeddings": True,
    }


def read_gemma2(fields: Fields) -> Values:
    """Read the values that a Gemma 2 has beyond the common ones."""
    windows = read_windows(fields, lambda layer: layer % 2 == 0)
    return read_rope(fields) | windows | read_gemma(fields)


def write_gemma2(config: DecoderConfig) -> Values:
    """Return the entries that a Gemma 2 has beyond the common ones."""
    names = ("attention_bias", "query_pre_attn_scalar")
    names += ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "hidden_activation": config.hidden_act,
        **same_names(*names)(config),
        **write_windows(config),
    }


def read_gemma3(fields: Fields) -> Values:
    """Read the values that a Gemma 3 has beyond the common ones."""
    every = read_period(fields, "sliding_window_pattern", 6)
    windows = read_windows(fields, lambda layer: (layer + 1) % every != 0)
    settings = fields.values.get("rope_parameters")
    local = fields.get("rope_local_base_freq", float)
    if isinstance(settings, dict) and {WINDOWED, UNWINDOWED} & settings.keys():
        wide, near = (fields.table(settings, kind) for kind in (UNWINDOWED, WINDOWED))
        if near.get("rope_type", "default") != "default":
            raise fields.refuse("rope type of windows", near["rope_type"], "'default'")
        check_whole_heads(fields, near)
        local = near.get("rope_theta", local)
        checked(f"{fields.file}: 'rope_theta' of windows", local, float)
        theta = fields.get("rope_theta", float)
        wide = {"rope_type": "default", "rope_theta": theta, **wide}
    else:
        wide = fields.rope()
    check_whole_heads(fields, wide)
    return (
        read_scaling(fields, wide)
        | windows
        | read_gemma(fields)
        | {"qk_norm": True, "rope_local_theta": local}
        | {"attn_logit_softcapping": None}  # transformers never uses it
    )


def write_gemma3(config: DecoderConfig) -> Values:
    """Return the entries that a Gemma 3 has beyond the common ones."""
    return {"rope_local_base_freq": config.rope_local_theta, **write_gemma2(config)}
