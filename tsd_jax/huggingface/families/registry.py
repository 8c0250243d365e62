"""All supported families by their `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from tsd_jax.huggingface.families.decoders import DECODERS
from tsd_jax.huggingface.families.encoders import ENCODERS
from tsd_jax.huggingface.families.family import Family, ModelConfig

FAMILIES: Mapping[str, Family] = {**DECODERS, **ENCODERS}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a model's config."""
    return FAMILIES[config.model_type]
