"""What several families have in common in config.json, read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsd_jax.huggingface.families.fields import Fields, checked, rope_settings
from tsd_jax.models.config import DecoderConfig

Values = dict[str, Any]
WINDOWED, WIDE = "sliding_attention", "full_attention"


def read_common(fields: Fields) -> Values:
    """Read what every family has."""
    heads = fields.get("num_attention_heads", "int")
    hidden = fields.get("hidden_size", "int")
    fits = heads > 0 and hidden % heads == 0
    wholes = ("vocab_size", "intermediate_size", "num_hidden_layers")
    head_dim = {"default": hidden // heads} if fits else {}
    return {
        **{name: fields.get(name, "int") for name in wholes},
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", "int", heads),
        "head_dim": fields.get("head_dim", "int", **head_dim),
        "rms_norm_eps": fields.get("rms_norm_eps", "float"),
        "max_position_embeddings": fields.get("max_position_embeddings", "int"),
        "tie_word_embeddings": fields.get("tie_word_embeddings", "bool"),
        "hidden_act": fields.get("hidden_act", "str", "silu"),
    }


def write_common(config: DecoderConfig) -> Values:
    """Return the entries of config.json that every family has."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta "
        "max_position_embeddings tie_word_embeddings hidden_act"
    )
    return {name: getattr(config, name) for name in names.split()} | rope_settings(
        config.rope_scaling
    )


def read_rope(fields: Fields) -> Values:
    """Read the one rotary embedding of all layers, which turns whole heads."""
    settings = fields.rope()
    read_full(fields, settings)
    return read_scaling(fields, settings)


def read_full(fields: Fields, settings: Mapping[str, Any]) -> None:
    """Refuse rotary settings that turn a part of each head."""
    part = read_part(fields, settings)
    if part != 1:
        raise fields.refuse("partial_rotary_factor", part, "1")


def read_part(fields: Fields, settings: Mapping[str, Any]) -> float:
    """Read the part of each head that is turned."""
    part = settings.get("partial_rotary_factor")
    if part is None:
        return fields.get("partial_rotary_factor", "float", 1.0)
    return checked(f"{fields.file}: 'partial_rotary_factor'", part, "float")


def read_scaling(fields: Fields, settings: Mapping[str, Any]) -> Values:
    """Read theta and the scaling from the rotary embedding's settings."""
    theta = settings["rope_theta"]
    return {
        "rope_theta": checked(f"{fields.file}: 'rope_theta'", theta, "float"),
        "rope_scaling": fields.scaling(settings),
    }


def read_window(fields: Fields) -> Values:
    """Read the window that all layers have, if any."""
    return {"sliding_window": fields.get("sliding_window", "int", None)}


def read_windows(fields: Fields, presumed: Callable[[int], bool]) -> Values:
    """Read which layers are windowed; where nothing tells, `presumed` does."""
    number = fields.get("num_hidden_layers", "int")
    types = fields.get("layer_types", "list", None)
    if types is None:
        layers = [presumed(layer) for layer in range(number)]
    else:
        for each in types:
            if each not in (WINDOWED, WIDE):
                raise fields.refuse("layer type", each, f"{WINDOWED} or {WIDE}")
        layers = [each == WINDOWED for each in types]
    check_layers(fields, "layer_types", layers)
    if not any(layers):
        return {}
    return {
        "sliding_window": fields.get("sliding_window", "int"),
        "window_layers": () if all(layers) else tuple(layers),
    }


def check_layers(fields: Fields, name: str, layers: Sequence[bool]) -> None:
    """Refuse a list that does not tell of every layer."""
    number = fields.get("num_hidden_layers", "int")
    if len(layers) != number:
        raise fields.refuse(f"the length of {name}", len(layers), number)


def read_chosen_windows(fields: Fields, presumed: Callable[[int], bool]) -> Values:
    """Read the windows of a family that turns them on by `use_sliding_window`."""
    if not fields.get("use_sliding_window", "bool", False):
        return {}
    if fields.get("sliding_window", "int", None) is None:
        return {}
    return read_windows(fields, presumed)


def write_windows(config: DecoderConfig) -> Values:
    """Return the entries that tell which layers are windowed."""
    return {
        "sliding_window": config.sliding_window,
        "layer_types": [WINDOWED if each else WIDE for each in config.windowed],
    }


def write_chosen_windows(config: DecoderConfig) -> Values:
    """Return the entries of a family that turns windows on by `use_sliding_window`."""
    used = config.sliding_window is not None
    return {"use_sliding_window": used, **write_windows(config)}


def read_period(fields: Fields, name: str, default: Any = None) -> int:
    """Read after how many layers a pattern begins anew."""
    every = fields.get(name, "int", default)
    if every < 1:
        raise fields.refuse(name, every, "a positive number")
    return every


def read_biases(fields: Fields) -> Values:
    """Read the biases that a Llama may have."""
    names = ("attention_bias", "mlp_bias")
    return {name: fields.get(name, "bool", False) for name in names}


def same_names(*names: str) -> Callable[[Any], Values]:
    """Make the function that writes fields of the same name on both sides."""
    return lambda config: {name: getattr(config, name) for name in names}
