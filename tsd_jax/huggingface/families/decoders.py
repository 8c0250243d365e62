"""What tells the families apart: how each one's config.json is read and written.

A family is found by its `model_type` in `FAMILIES`. Its defaults are those that
transformers assumes where a config.json is silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tsd_jax.huggingface.families.common import (
    WIDE,
    WINDOWED,
    Values,
    check_layers,
    read_biases,
    read_chosen_windows,
    read_full,
    read_part,
    read_period,
    read_rope,
    read_scaling,
    read_window,
    read_windows,
    same_names,
    write_chosen_windows,
    write_windows,
)
from tsd_jax.huggingface.families.encoders import ENCODERS
from tsd_jax.huggingface.families.family import Family, ModelConfig
from tsd_jax.huggingface.families.fields import Fields, checked
from tsd_jax.models.config import DecoderConfig, Experts


def _read_llama(fields: Fields) -> Values:
    return read_rope(fields) | read_biases(fields)


def _read_mistral(fields: Fields) -> Values:
    if "layer_types" in fields.values:  # transformers takes it for a Ministral, too
        return {**_read_ministral(fields), "model_type": "ministral"}
    return read_rope(fields) | read_window(fields)


def _read_ministral(fields: Fields) -> Values:
    windowed = fields.get("sliding_window", "int", None) is not None
    return read_rope(fields) | read_windows(fields, lambda _: windowed)


def _read_qwen2(fields: Fields) -> Values:
    first = fields.get("max_window_layers", "int")
    windows = read_chosen_windows(fields, lambda layer: layer >= first)
    return read_rope(fields) | windows | {"qkv_bias": True}


def _read_qwen3(fields: Fields) -> Values:
    first = fields.get("max_window_layers", "int")
    windows = read_chosen_windows(fields, lambda layer: layer >= first)
    bias = fields.get("attention_bias", "bool", False)
    return read_rope(fields) | windows | {"attention_bias": bias, "qk_norm": True}


def _write_qwen3(config: DecoderConfig) -> Values:
    return {"attention_bias": config.attention_bias, **write_chosen_windows(config)}


def _read_mixtral(fields: Fields) -> Values:
    experts = Experts(
        num_experts=fields.get("num_local_experts", "int"),
        num_experts_per_tok=fields.get("num_experts_per_tok", "int"),
        intermediate_size=fields.get("intermediate_size", "int"),
    )
    return read_rope(fields) | read_window(fields) | {"experts": experts}


def _write_mixtral(config: DecoderConfig) -> Values:
    experts = config.experts
    assert experts is not None
    return {
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "sliding_window": config.sliding_window,
    }


def _qwen_experts(fields: Fields, shared: int | None) -> Experts:
    """Read a mixture that must be in every layer."""
    dense = fields.get("mlp_only_layers", "list", [])
    step = fields.get("decoder_sparse_step", "int", 1)
    if dense:
        raise fields.refuse("mlp_only_layers", dense, "an empty list")
    if step != 1:
        raise fields.refuse("decoder_sparse_step", step, "1")
    # transformers 5 writes the other name.
    number = fields.get("num_local_experts", "int", None)
    return Experts(
        num_experts=fields.get("num_experts", "int") if number is None else number,
        num_experts_per_tok=fields.get("num_experts_per_tok", "int"),
        intermediate_size=fields.get("moe_intermediate_size", "int"),
        norm_topk_prob=fields.get("norm_topk_prob", "bool", False),
        shared_intermediate_size=shared,
    )


def _write_qwen_experts(config: DecoderConfig) -> Values:
    experts = config.experts
    assert experts is not None
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _read_qwen2_moe(fields: Fields) -> Values:
    last = fields.get("max_window_layers", "int")
    windows = read_chosen_windows(fields, lambda layer: layer % 2 == 0 and layer < last)
    shared = fields.get("shared_expert_intermediate_size", "int")
    bias = fields.get("qkv_bias", "bool", True)
    experts = _qwen_experts(fields, shared)
    return read_rope(fields) | windows | {"qkv_bias": bias, "experts": experts}


def _write_qwen2_moe(config: DecoderConfig) -> Values:
    assert config.experts is not None
    return {
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": config.experts.shared_intermediate_size,
        **_write_qwen_experts(config),
        **write_chosen_windows(config),
    }


def _read_qwen3_moe(fields: Fields) -> Values:
    values = read_rope(fields) | {
        "attention_bias": fields.get("attention_bias", "bool", False),
        "qk_norm": True,
        "experts": _qwen_experts(fields, None),
    }
    used = fields.get("use_sliding_window", "bool", False)
    return values | (read_window(fields) if used else {})


def _write_qwen3_moe(config: DecoderConfig) -> Values:
    return {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        **_write_qwen_experts(config),
    }


def _read_gemma(fields: Fields) -> Values:
    if fields.get("use_bidirectional_attention", "bool", False):
        raise fields.refuse("use_bidirectional_attention", True, False)
    limits = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "hidden_act": fields.get("hidden_activation", "str", "gelu_pytorch_tanh"),
        "attention_bias": fields.get("attention_bias", "bool", False),
        "query_pre_attn_scalar": fields.get("query_pre_attn_scalar", "float"),
        **{name: fields.get(name, "float", None) for name in limits},
        "norm_around_one": True,
        "post_norms": True,
        "scale_embeddings": True,
    }


def _read_gemma2(fields: Fields) -> Values:
    windows = read_windows(fields, lambda layer: layer % 2 == 0)
    return read_rope(fields) | windows | _read_gemma(fields)


def _write_gemma2(config: DecoderConfig) -> Values:
    names = ("attention_bias", "query_pre_attn_scalar")
    names += ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        "hidden_activation": config.hidden_act,
        **same_names(*names)(config),
        **write_windows(config),
    }


def _read_gemma3(fields: Fields) -> Values:
    every = read_period(fields, "sliding_window_pattern", 6)
    windows = read_windows(fields, lambda layer: (layer + 1) % every != 0)
    settings = fields.values.get("rope_parameters")
    local = fields.get("rope_local_base_freq", "float")
    if isinstance(settings, dict) and {WINDOWED, WIDE} & settings.keys():
        wide, near = (fields.table(settings, kind) for kind in (WIDE, WINDOWED))
        if near.get("rope_type", "default") != "default":
            raise fields.refuse("rope type of windows", near["rope_type"], "'default'")
        read_full(fields, near)
        local = near.get("rope_theta", local)
        checked(f"{fields.file}: 'rope_theta' of windows", local, "float")
        theta = fields.get("rope_theta", "float")
        wide = {"rope_type": "default", "rope_theta": theta, **wide}
    else:
        wide = fields.rope()
    read_full(fields, wide)
    # Without the scaling, the published files say attn_logit_softcapping: null.
    return (
        read_scaling(fields, wide)
        | windows
        | _read_gemma(fields)
        | {"qk_norm": True, "rope_local_theta": local}
        | {"attn_logit_softcapping": None}  # transformers reads it, and never uses it
    )


def _write_gemma3(config: DecoderConfig) -> Values:
    return {"rope_local_base_freq": config.rope_local_theta, **_write_gemma2(config)}


def _read_phi3(fields: Fields) -> Values:
    # Older files say "su" or "yarn" and mean what is now "longrope".
    settings = fields.rope(aliases={"su": "longrope", "yarn": "longrope"})
    if settings["rope_type"] not in ("default", "longrope"):
        raise fields.refuse("rope type", settings["rope_type"], "default or longrope")
    return {
        **read_scaling(fields, settings),
        **read_window(fields),
        "partial_rotary_factor": read_part(fields, settings),
        "fused_projections": True,
    }


def _write_phi3(config: DecoderConfig) -> Values:
    trained = getattr(config.rope_scaling, "original_max_position_embeddings", None)
    values = same_names("partial_rotary_factor", "sliding_window")(config)
    return values | (
        {} if trained is None else {"original_max_position_embeddings": trained}
    )


def _read_smollm3(fields: Fields) -> Values:
    number = fields.get("num_hidden_layers", "int")
    every = read_period(fields, "no_rope_layer_interval")
    turned: Sequence[Any] = fields.get(
        "no_rope_layers", "list", [(n + 1) % every for n in range(number)]
    )
    layers = tuple(bool(each) for each in turned[: max(number, 0)])  # may tell of more
    check_layers(fields, "no_rope_layers", layers)
    windows = read_chosen_windows(fields, lambda layer: not layers[layer])
    return {
        **read_rope(fields),
        **windows,
        **read_biases(fields),
        "rope_layers": () if all(layers) else layers,
    }


def _write_smollm3(config: DecoderConfig) -> Values:
    turned = config.rope_layers or (True,) * config.num_hidden_layers
    return {
        "no_rope_layers": [int(each) for each in turned],
        **same_names("attention_bias", "mlp_bias")(config),
        **write_chosen_windows(config),
    }


def _defaults(
    theta: float = 1e4, length: int = 32768, *, tied: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "rms_norm_eps": 1e-6,
        "rope_theta": theta,
        "max_position_embeddings": length,
        "tie_word_embeddings": tied,
        **more,
    }


_GEMMA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN: Mapping[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _defaults(length=2048),
        _read_llama,
        same_names("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _defaults(length=131072, num_key_value_heads=8, sliding_window=4096),
        _read_mistral,
        same_names("sliding_window"),
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _defaults(length=131072, num_key_value_heads=8, sliding_window=4096),
        _read_ministral,
        write_windows,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _defaults(1e6, 131072, num_key_value_heads=8)
        | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
        _read_mixtral,
        _write_mixtral,
        {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3"}
        | {"down_proj": "w2"},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _defaults(num_key_value_heads=32, **_QWEN),
        _read_qwen2,
        write_chosen_windows,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _defaults(num_key_value_heads=32, head_dim=128, **_QWEN),
        _read_qwen3,
        _write_qwen3,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _defaults(num_key_value_heads=16, **_QWEN)
        | {"num_experts": 60, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        _read_qwen2_moe,
        _write_qwen2_moe,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _defaults(num_key_value_heads=4, sliding_window=4096)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        _read_qwen3_moe,
        _write_qwen3_moe,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _defaults(length=8192, tied=True, **_GEMMA)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _read_gemma2,
        _write_gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _defaults(1e6, 131072, tied=True, rope_local_base_freq=1e4, **_GEMMA),
        _read_gemma3,
        _write_gemma3,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _defaults(length=4096, original_max_position_embeddings=4096)
        | {"rms_norm_eps": 1e-5},
        _read_phi3,
        _write_phi3,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _defaults(2e6, tied=True, num_key_value_heads=4, no_rope_layer_interval=4),
        _read_smollm3,
        _write_smollm3,
    ),
    **ENCODERS,
}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model's config."""
    return FAMILIES[config.model_type]
