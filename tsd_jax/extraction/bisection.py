"""Eigenvalues of a symmetric tridiagonal matrix by bisection on Sturm counts.

`jax.scipy.linalg.eigh_tridiagonal` does the same with a division in every step of its
recurrence. The polynomial form used here has none, and one count of many shifts at once
replaces the first bisections: half the time, equal to the last digit.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

_SHIFTS = 1024  # counted at a time, so that the recurrence's carry stays in the cache
_ROWS = 16  # rows of the recurrence in one iteration of its loop
# Smallest pivot, in units of the norm; below it rounding decides the sign anyway. A
# minor may shrink by this much in every row, so products of two are rescaled every 8.
_LEAST, _RESCALE = 1e-17, 8


def eigenvalues(
    diagonal: Float[Array, "n"], off: Float[Array, "n-1"]
) -> Float[Array, "n"]:
    """Return all eigenvalues of T, to a rounding error of ||T||.

    Args:
      diagonal: diagonal of T, (n,), float64.
      off: subdiagonal of T, (n - 1,), float64.

    Returns:
      Eigenvalues, ascending, (n,), float64.
    """
    beside = jnp.abs(off)
    radius = jnp.pad(beside, (1, 0)) + jnp.pad(beside, (0, 1))
    bound = jnp.max(jnp.abs(diagonal) + radius)
    norm = jnp.where(bound > 0, bound, 1.0)
    diagonal, squares = diagonal / norm, jnp.pad((off / norm) ** 2, (1, 0))
    eps = float(jnp.finfo(diagonal.dtype).eps)
    wanted = jnp.arange(len(diagonal))

    # By Gershgorin's theorem all of them lie in [-1, 1].
    grid = jnp.linspace(-1 - eps, 1 + 2 * eps, len(wanted) + 1)
    counts = count_below(diagonal, squares, grid)
    above = jnp.clip(jnp.searchsorted(counts, wanted, side="right"), 1, len(wanted))

    def halve(step: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        del step
        low, high = bracket
        middle = (low + high) / 2
        over = count_below(diagonal, squares, middle) <= wanted
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    steps = 0
    while 2 / len(wanted) / 2**steps > eps:
        steps += 1
    low, high = lax.fori_loop(0, steps, halve, (grid[above - 1], grid[above]))
    return lax.cummax((low + high) / 2 * bound)


def count_below(
    diagonal: Float[Array, "n"],
    squares: Float[Array, "n"],
    shifts: Float[Array, "c"],
) -> Int[Array, "c"]:
    """Return the number of eigenvalues of T below each shift, (c,), int32.

    Counts the sign changes in the sequence of leading principal minors of T - x,

        p_k = (d_k - x) p_{k-1} - e_{k-1}^2 p_{k-2},

    which is rescaled every few rows.

    Args:
      diagonal: d, (n,), float64, with ||T|| <= 1.
      squares: 0 and then e^2, (n,), float64.
      shifts: x, (c,), float64.

    Source: Barth, Martin and Wilkinson, "Calculation of the eigenvalues of a symmetric
    tridiagonal matrix by the method of bisection", Numer. Math. 9 (1967).
    """
    padding = -len(diagonal) % _ROWS
    # The padding rows have eigenvalue 2, which is below no shift.
    rows = (
        jnp.pad(diagonal, (0, padding), constant_values=2.0).reshape(-1, _ROWS),
        jnp.pad(squares, (0, padding)).reshape(-1, _ROWS),
    )

    def count(x: Array) -> Array:
        def block(carry, rows):
            last, before, changes = carry
            for row, (d, square) in enumerate(zip(*rows, strict=True)):
                if row % _RESCALE == 0:
                    scale = 1 / (jnp.abs(last) + jnp.abs(before))
                    last, before = last * scale, before * scale
                minor = (d - x) * last - square * before
                least = -_LEAST * last
                minor = jnp.where(jnp.abs(minor) < jnp.abs(least), least, minor)
                # Counted in floats: a loop over a single type is faster.
                changes = changes + jnp.where(minor * last < 0, 1.0, 0.0)
                last, before = minor, last
            return (last, before, changes), None

        one, zero = jnp.ones_like(x), jnp.zeros_like(x)
        return lax.scan(block, (one, zero, zero), rows)[0][2]

    width = min(_SHIFTS, len(shifts))
    padded = jnp.pad(shifts, (0, -len(shifts) % width), mode="edge")
    counts = lax.map(count, padded.reshape(-1, width)).reshape(-1)
    return counts[: len(shifts)].astype(jnp.int32)
