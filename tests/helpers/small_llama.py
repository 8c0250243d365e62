"""A small Llama and random parameters of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.huggingface import names
from tsd_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=True,
)


def random_params() -> dict[str, Any]:
    """Return a tree of random numbers, the same every time."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        names.abstract_params(CONFIG),
    )
