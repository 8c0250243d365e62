"""What several families have in common in config.json, read and written.

A reader takes the fields of a config.json and returns values of our config; a writer
takes our config and returns entries of a config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsd_jax.huggingface.families.fields import Fields, checked, rope_settings
from tsd_jax.models.config import DecoderConfig, Experts

Values = dict[str, Any]
WINDOWED, UNWINDOWED = "sliding_attention", "full_attention"
"""The types of layers, as `layer_types` lists them."""

_SIZES = ("vocab_size", "intermediate_size", "num_hidden_layers")
_WRITTEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
    "hidden_act",
)


def read_common(fields: Fields) -> Values:
    """Read the values that every decoder has."""
    heads = fields.get("num_attention_heads", int)
    hidden = fields.get("hidden_size", int)
    fits = heads > 0 and hidden % heads == 0
    head_dim = {"default": hidden // heads} if fits else {}
    return {
        **{name: fields.get(name, int) for name in _SIZES},
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", int, heads),
        "head_dim": fields.get("head_dim", int, **head_dim),
        "rms_norm_eps": fields.get("rms_norm_eps", float),
        "max_position_embeddings": fields.get("max_position_embeddings", int),
        "tie_word_embeddings": fields.get("tie_word_embeddings", bool),
        "hidden_act": fields.get("hidden_act", str, "silu"),
    }


def write_common(config: DecoderConfig) -> Values:
    """Return the entries that every decoder has."""
    return same_names(*_WRITTEN)(config) | rope_settings(config.rope_scaling)


def same_names(*names: str) -> Callable[[Any], Values]:
    """Return a writer of fields that have the same name on both sides."""
    return lambda config: {name: getattr(config, name) for name in names}


def read_rope(fields: Fields) -> Values:
    """Read the rotary embedding of a family that rotates whole heads in all layers."""
    settings = fields.rope()
    check_whole_heads(fields, settings)
    return read_scaling(fields, settings)


def check_whole_heads(fields: Fields, settings: Mapping[str, Any]) -> None:
    """Refuse rotary settings that rotate only a part of each head."""
    part = read_rotary_part(fields, settings)
    if part != 1:
        raise fields.refuse("partial_rotary_factor", part, "1")


def read_rotary_part(fields: Fields, settings: Mapping[str, Any]) -> float:
    """Read the part of each head that is rotated."""
    part = settings.get("partial_rotary_factor")
    if part is None:
        return fields.get("partial_rotary_factor", float, 1.0)
    return checked(f"{fields.file}: 'partial_rotary_factor'", part, float)


def read_scaling(fields: Fields, settings: Mapping[str, Any]) -> Values:
    """Read theta and the scaling from the rotary embedding's settings."""
    theta = settings["rope_theta"]
    return {
        "rope_theta": checked(f"{fields.file}: 'rope_theta'", theta, float),
        "rope_scaling": fields.scaling(settings),
    }


def read_window(fields: Fields) -> Values:
    """Read the attention window that all layers have, if any."""
    return {"sliding_window": fields.get("sliding_window", int, None)}


def read_windows(fields: Fields, presumed: Callable[[int], bool]) -> Values:
    """Read which layers have an attention window.

    Args:
      fields: of the config.json.
      presumed: layer -> whether it has one, where `layer_types` is absent.
    """
    number = fields.get("num_hidden_layers", int)
    types = fields.get("layer_types", list, None)
    if types is None:
        layers = [presumed(layer) for layer in range(number)]
    else:
        for each in types:
            if each not in (WINDOWED, UNWINDOWED):
                raise fields.refuse("layer type", each, f"{WINDOWED} or {UNWINDOWED}")
        layers = [each == WINDOWED for each in types]
    check_layers(fields, "layer_types", layers)
    if not any(layers):
        return {}
    return {
        "sliding_window": fields.get("sliding_window", int),
        "window_layers": () if all(layers) else tuple(layers),
    }


def check_layers(fields: Fields, name: str, layers: Sequence[bool]) -> None:
    """Refuse a list that does not have one entry for every layer."""
    number = fields.get("num_hidden_layers", int)
    if len(layers) != number:
        raise fields.refuse(f"the length of {name}", len(layers), number)


def read_chosen_windows(fields: Fields, presumed: Callable[[int], bool]) -> Values:
    """Read the windows of a family that turns them on by `use_sliding_window`."""
    if not fields.get("use_sliding_window", bool, False):
        return {}
    if fields.get("sliding_window", int, None) is None:
        return {}
    return read_windows(fields, presumed)


def write_windows(config: DecoderConfig) -> Values:
    """Return the entries that say which layers have an attention window."""
    return {
        "sliding_window": config.sliding_window,
        "layer_types": [WINDOWED if each else UNWINDOWED for each in config.windowed],
    }


def write_chosen_windows(config: DecoderConfig) -> Values:
    """Return the entries of a family that turns windows on by `use_sliding_window`."""
    used = config.sliding_window is not None
    return {"use_sliding_window": used, **write_windows(config)}


def read_period(fields: Fields, name: str, default: Any = None) -> int:
    """Read the number of layers after which a pattern repeats."""
    every = fields.get(name, int, default)
    if every < 1:
        raise fields.refuse(name, every, "a positive number")
    return every


def read_biases(fields: Fields) -> Values:
    """Read which of its layers a Llama gives biases."""
    names = ("attention_bias", "mlp_bias")
    return {name: fields.get(name, bool, False) for name in names}


def experts_of(config: DecoderConfig) -> Experts:
    """Return the experts of a family that always has some."""
    assert config.experts is not None
    return config.experts
