"""What A, B and the offsets are right after launch: one table of choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from tsd_jax.extraction.ranking import Ranked


class Restart(NamedTuple):
    """The restarted factors of one matrix.

    Attributes:
      a: A, (in, r).
      b: B, (r, out).
      offset: o of the first r directions, (r,).
    """

    a: Float[Array, "in r"]
    b: Float[Array, "r out"]
    offset: Float[Array, "r"]


def _scaled(ranked: Ranked, values: Float[Array, "r"], scale: float) -> Restart:
    """Return gamma A B = sum values_i P_i Q_i^T, the root of it in each factor."""
    rank = len(values)
    root = jnp.sqrt(jnp.abs(values) / scale)
    along = (jnp.sign(values) * root)[:, None] * ranked.right[:, :rank].T
    return Restart(ranked.left[:, :rank] * root[None], along, -ranked.chosen[:rank])


def _sigma(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at sigma: A = P sqrt(sigma / gamma), B = sqrt(sigma / gamma) Q^T."""
    return _scaled(ranked, ranked.chosen[:rank], scale)


def _sigma_and_delta(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at sigma + p, its sign on B: K + sum p_i P_i Q_i^T after launch."""
    return _scaled(ranked, ranked.chosen[:rank] + ranked.moved[:rank], scale)


def _zero(ranked: Ranked, rank: int, scale: float) -> Restart:
    """Restart at zero: A = P, B = 0, o = 0; only the directions are used."""
    del scale
    a = ranked.left[:, :rank]
    return Restart(
        a, jnp.zeros_like(ranked.right[:, :rank].T), jnp.zeros(rank, a.dtype)
    )


RESTARTS: dict[str, Callable[[Ranked, int, float], Restart]] = {
    "sigma": _sigma,
    "sigma+p": _sigma_and_delta,
    "zero": _zero,
}
"""Interpretations of the paper's Init, which gives no formula.

Each takes (ranked, r, gamma) and returns a `Restart`. The names are those of
`core.methods.STARTS`.
"""
