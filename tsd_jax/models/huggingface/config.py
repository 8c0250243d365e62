"""The file config.json: read into a LlamaConfig, and written from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.models.huggingface.tensors import read_json
from tsd_jax.models.llama import LlamaConfig

# What transformers assumes of a Llama where its config.json is silent.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_CAUSAL = ["LlamaForCausalLM"]
_TYPES = {"int": int, "float": (int, float), "bool": bool}


def read_config(folder: str | Path) -> LlamaConfig:
    """Read the config.json of a Llama, refusing what the model here does not compute.

    Raises:
      InputError: if the file is missing or damaged, lacks a field, has one of the
        wrong type, or names another architecture, activation, rotary embedding, or
        quantised weights.
    """
    file = Path(folder) / "config.json"
    found = read_json(file)
    _refuse_others(file, found)
    given = {name: value for name, value in found.items() if value is not None}
    known = {**_DEFAULTS, **_derived(found), **_rope(found), **given}
    values = {}
    for field in dataclasses.fields(LlamaConfig):
        if field.name not in known:
            raise InputError(f"{file} lacks {field.name!r}: fetch the model's config")
        value = known[field.name]
        is_bool = isinstance(value, bool)
        if is_bool != (field.type == "bool") or not isinstance(
            value, _TYPES[str(field.type)]
        ):
            raise InputError(
                f"{file}: {field.name!r} must be of type {field.type}, not {value!r}"
            )
        values[field.name] = value
    try:
        return LlamaConfig(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Give the content of the config.json that transformers reads as this Llama.

    Args:
      config: of the model.
      dtype: of the stored weights, by name.
    """
    return {
        "architectures": _CAUSAL,
        "model_type": "llama",
        **dataclasses.asdict(config),
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def _derived(found: Mapping[str, Any]) -> dict[str, Any]:
    """Give the head counts and widths that older files leave out."""
    heads: Any = found.get("num_attention_heads")
    hidden: Any = found.get("hidden_size")
    derived: dict[str, Any] = {"num_key_value_heads": heads}
    whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    if whole and hidden % heads == 0:
        derived["head_dim"] = hidden // heads
    return derived


def _rope(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take the rotary embedding's settings from where transformers 5 or 4 has them."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    return rope if isinstance(rope, dict) else {"rope_type": rope}


def _refuse_others(file: Path, found: Mapping[str, Any]) -> None:
    """Refuse by name every model that is not the one computed here."""
    rope = _rope(found)
    facts = {
        "model_type": (found.get("model_type"), "llama"),
        "architectures": (found.get("architectures") or _CAUSAL, _CAUSAL),
        "hidden_act": (found.get("hidden_act", "silu"), "silu"),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "quantization_config": (found.get("quantization_config"), None),
    }
    for name, (value, only) in facts.items():
        if value != only:
            raise InputError(
                f"{file}: {name} is {value!r}, and only {only!r} is supported: choose "
                "another checkpoint"
            )
