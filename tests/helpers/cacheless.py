"""A language model that needs no cache: its logits are a row of a table."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tsd_jax.evaluation.decoding import Rows


def lookup(variables, tokens, *, mask=None, decode, mutable):
    """Return the table's rows, and a cache that is one number."""
    assert decode
    assert mutable == ["cache"]
    return variables["table"][tokens], {"cache": {"used": jnp.zeros((), jnp.int32)}}


def rows_of(tokens: list[list[int]]) -> Rows:
    """Return prompts of one length."""
    array = jnp.asarray(tokens, jnp.int32)
    numbers = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    return Rows(array, jnp.ones(array.shape, bool), numbers)


def random_table(vocabulary: int, scale: float = 1.0) -> np.ndarray:
    """Return logits of each token after each."""
    shape = (vocabulary, vocabulary)
    table = np.random.default_rng(0).normal(size=shape) * scale
    return table.astype(np.float32)
