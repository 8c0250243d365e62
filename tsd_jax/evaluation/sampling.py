"""Tokens drawn from a model's distribution, cut to its likely part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from tsd_jax.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: z / temperature, then top-k, then top-p.

    Attributes:
      temperature: above 0.
      top_k: how many of the likeliest tokens stay; 0 for all.
      top_p: the fewest likeliest tokens stay whose chances reach this, in (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        """Refuse distributions that do not exist."""
        if not 0 < self.temperature < math.inf:
            raise InputError(
                f"temperature must be a number above 0 to sample, not "
                f"{self.temperature}"
            )
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")


def draw(
    logits: Array, sampling: Sampling, key: Array | None, numbers: Array, step: Array
) -> Array:
    """Return a token for each row, (B,) int32.

    Args:
      logits: (B, V) float32.
      sampling: the distribution.
      key: typed key of the whole generation.
      numbers: of the rows, (B,) int32: rows draw independently of each other.
      step: () int32.
    """
    assert key is not None

    def one(logits: Array, number: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, number), step)
        return jax.random.categorical(own, logits)

    return jax.vmap(one)(likely(logits, sampling), numbers).astype(jnp.int32)


def likely(logits: Array, sampling: Sampling) -> Array:
    """Return tempered logits (B, V), -inf for tokens that are not to be drawn.

    Tokens as likely as the last one that stays, stay too.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _at_least(logits, lax.top_k(logits, sampling.top_k)[0][:, -1:])
    if sampling.top_p == 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    stay = jnp.where(before < sampling.top_p, ordered, jnp.inf)
    return _at_least(logits, jnp.min(stay, axis=-1, keepdims=True))


def _at_least(logits: Array, bound: Array) -> Array:
    return jnp.where(logits < bound, -jnp.inf, logits)
