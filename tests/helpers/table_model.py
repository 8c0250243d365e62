"""The smallest language model, a table of logits, and rows of random tokens for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def lookup(variables, tokens):
    """Return as logits the row of the table that each token names."""
    return variables["table"][tokens]


def logit_table(vocabulary: int, scale: float) -> dict[str, jax.Array]:
    """Return the model's variables: random logits of this size."""
    logits = np.random.default_rng(0).normal(size=(vocabulary, vocabulary)) * scale
    return {"table": jnp.asarray(logits, jnp.float32)}


def token_rows(vocabulary: int, count: int, length: int) -> dict[str, np.ndarray]:
    """Return random tokens and targets, some of which have weight 0."""
    rng = np.random.default_rng(1)
    shape = (count, length)
    return {
        "tokens": rng.integers(vocabulary, size=shape, dtype=np.int32),
        "targets": rng.integers(vocabulary, size=shape, dtype=np.int32),
        "weights": rng.integers(2, size=shape).astype(np.float32),
    }
