"""What A, B and the offsets are right after launch: one table of readings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsd_jax.extraction.ranking import Ranked


class Restart(NamedTuple):
    """Hold the restarted factors of one matrix.

    Attributes:
      a: (in, r). b: (r, out). offset: of the first r directions, (r,).
    """

    a: jax.Array
    b: jax.Array
    offset: jax.Array


def _scaled(ranked: Ranked, values: jax.Array, scale: float) -> Restart:
    """Put `values` (r,) along the first directions into A B, half into each factor."""
    rank = len(values)
    root = jnp.sqrt(jnp.abs(values) / scale)
    along = (jnp.sign(values) * root)[:, None] * ranked.right[:, :rank].T
    return Restart(ranked.left[:, :rank] * root[None], along, -ranked.chosen[:rank])


def _sigma(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at sigma: A = P sqrt(sigma / gamma), B = sqrt(sigma / gamma) Q^T."""
    return _scaled(ranked, ranked.chosen[:rank], scale)


def _sigma_and_change(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at sigma + p, its sign on B: K + sum p_i P_i Q_i^T after launch."""
    return _scaled(ranked, ranked.chosen[:rank] + ranked.moved[:rank], scale)


def _zero(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at zero: A = P, B = 0, o = 0; only the directions are taken."""
    a = ranked.left[:, :rank]
    return Restart(
        a, jnp.zeros_like(ranked.right[:, :rank].T), jnp.zeros(rank, a.dtype)
    )


RESTARTS: dict[str, Callable[[Ranked, int, float], Restart]] = {
    "sigma": _sigma,
    "sigma+p": _sigma_and_change,
    "zero": _zero,
}
"""Readings of the paper's Init, which gives no formula: (ranked, r, gamma) -> Restart."""
