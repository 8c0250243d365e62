"""config.json of Llama and its relatives: Mistral, Mixtral, Phi 3, SmolLM 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsd_jax.huggingface.families.common import (
    Values,
    check_layers,
    experts_of,
    read_biases,
    read_chosen_windows,
    read_period,
    read_rope,
    read_rotary_part,
    read_scaling,
    read_window,
    read_windows,
    same_names,
    write_chosen_windows,
)
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.config import DecoderConfig, Experts


def read_llama(fields: Fields) -> Values:
    """Read the values that a Llama has beyond the common ones."""
    return read_rope(fields) | read_biases(fields)


def read_mistral(fields: Fields) -> Values:
    """Read the values that a Mistral has beyond the common ones."""
    if "layer_types" in fields.values:  # as in transformers
        return {**read_ministral(fields), "model_type": "ministral"}
    return read_rope(fields) | read_window(fields)


def read_ministral(fields: Fields) -> Values:
    """Read the values that a Ministral has beyond the common ones."""
    windowed = fields.get("sliding_window", int, None) is not None
    return read_rope(fields) | read_windows(fields, lambda _: windowed)


def read_mixtral(fields: Fields) -> Values:
    """Read the values that a Mixtral has beyond the common ones."""
    experts = Experts(
        num_experts=fields.get("num_local_experts", int),
        num_experts_per_tok=fields.get("num_experts_per_tok", int),
        intermediate_size=fields.get("intermediate_size", int),
    )
    return read_rope(fields) | read_window(fields) | {"experts": experts}


def write_mixtral(config: DecoderConfig) -> Values:
    """Return the entries that a Mixtral has beyond the common ones."""
    experts = experts_of(config)
    return {
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_experts_per_tok,
        "sliding_window": config.sliding_window,
    }


def read_phi3(fields: Fields) -> Values:
    """Read the values that a Phi 3 has beyond the common ones."""
    # Older files say "su" or "yarn" for what is now "longrope".
    settings = fields.rope(aliases={"su": "longrope", "yarn": "longrope"})
    if settings["rope_type"] not in ("default", "longrope"):
        raise fields.refuse("rope type", settings["rope_type"], "default or longrope")
    return {
        **read_scaling(fields, settings),
        **read_window(fields),
        "partial_rotary_factor": read_rotary_part(fields, settings),
        "fused_projections": True,
    }


def write_phi3(config: DecoderConfig) -> Values:
    """Return the entries that a Phi 3 has beyond the common ones."""
    trained = getattr(config.rope_scaling, "original_max_position_embeddings", None)
    values = same_names("partial_rotary_factor", "sliding_window")(config)
    return values | (
        {} if trained is None else {"original_max_position_embeddings": trained}
    )


def read_smollm3(fields: Fields) -> Values:
    """Read the values that a SmolLM 3 has beyond the common ones."""
    number = fields.get("num_hidden_layers", int)
    every = read_period(fields, "no_rope_layer_interval")
    turned: Sequence[Any] = fields.get(
        "no_rope_layers", list, [(n + 1) % every for n in range(number)]
    )
    # The list may go on past the last layer.
    layers = tuple(bool(each) for each in turned[: max(number, 0)])
    check_layers(fields, "no_rope_layers", layers)
    windows = read_chosen_windows(fields, lambda layer: not layers[layer])
    return {
        **read_rope(fields),
        **windows,
        **read_biases(fields),
        "rope_layers": () if all(layers) else layers,
    }


def write_smollm3(config: DecoderConfig) -> Values:
    """Return the entries that a SmolLM 3 has beyond the common ones."""
    turned = config.rope_layers or (True,) * config.num_hidden_layers
    return {
        "no_rope_layers": [1 if each else 0 for each in turned],
        **same_names("attention_bias", "mlp_bias")(config),
        **write_chosen_windows(config),
    }
