"""A symmetric matrix as Q T Q^T with T tridiagonal; eigenvectors a few at a time.

Ranking needs what every eigenvector sees of a few columns, and the eigenvectors
themselves of a few directions only. From the tridiagonal form both cost O(n^2): all of
LAPACK's work after the reduction, two thirds of a full eigendecomposition, is saved.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.extraction.bisection import eigenvalues

_COLUMNS = 256  # eigenvectors of T formed at a time
_UNROLL = 8  # steps of a recurrence in one turn of its loop
_DISTINCT = 1e-13  # gaps, in units of the largest eigenvalue, that can be told apart


class Tridiagonal(NamedTuple):
    """Hold G = Q T Q^T = P diag(eigenvalues) P^T, n x n; float64.

    Attributes:
      reflectors: Q without its first row and column, which are those of the identity,
        as LAPACK's sytrd leaves it, (n - 1, n - 1).
      taus: its factors, (n - 1,).
      diagonal: of T, (n,). off: beside it, (n - 1,).
      eigenvalues: descending, (n,).
    """

    reflectors: jax.Array
    taus: jax.Array
    diagonal: jax.Array
    off: jax.Array
    eigenvalues: jax.Array

    def project(self, columns: jax.Array) -> jax.Array:
        """Return P^T columns, (n, c), without forming P."""
        rotated = self._rotate(columns, transpose=True)
        width = min(_COLUMNS, len(self.diagonal))
        padding = -len(self.diagonal) % width
        shifts = jnp.pad(self.eigenvalues, (0, padding), mode="edge")
        parts = lax.map(
            lambda some: self._tridiagonal_vectors(some).T @ rotated,
            shifts.reshape(-1, width),
        )
        return parts.reshape(-1, columns.shape[1])[: len(self.diagonal)]

    def vectors(self, indices: jax.Array) -> jax.Array:
        """Return eigenvectors P[:, indices], (n, c)."""
        return self._rotate(self._tridiagonal_vectors(self.eigenvalues[indices]))

    def correct(self, residual: jax.Array, indices: jax.Array) -> jax.Array:
        """Solve (lambda_i - G) x_i = residual_i for x_i orthogonal to P_i, (n, c)."""
        shifts = self.eigenvalues[indices]
        z = self._tridiagonal_vectors(shifts)

        def orthogonal(x: jax.Array) -> jax.Array:
            return x - z * jnp.sum(z * x, 0)[None]

        right = orthogonal(self._rotate(residual, transpose=True))
        # Off the eigenvalue by some rounding: no pivot is zero, and what this adds
        # along z is projected away.
        shifts = shifts + 8 * jnp.finfo(shifts.dtype).eps * self.eigenvalues[0]
        above, below = jnp.pad(-self.off, (0, 1)), jnp.pad(-self.off, (1, 0))
        shape = (len(shifts), len(self.diagonal))
        x = lax.linalg.tridiagonal_solve(
            jnp.broadcast_to(below, shape),
            shifts[:, None] - self.diagonal[None],
            jnp.broadcast_to(above, shape),
            right.T[..., None],
        )[..., 0].T
        return self._rotate(orthogonal(jnp.where(jnp.isfinite(x), x, 0.0)))

    def distinct(self, used: jax.Array) -> jax.Array:
        """Return whether the eigenvalues marked in `used` (n,) stand apart, bool ()."""
        gaps = self.eigenvalues[:-1] - self.eigenvalues[1:]
        apart = gaps > _DISTINCT * self.eigenvalues[0]
        return jnp.all(apart | ~used[1:]) & (self.eigenvalues[0] > 0)

    def _rotate(self, columns: jax.Array, *, transpose: bool = False) -> jax.Array:
        """Return Q columns, or Q^T columns."""
        rest = lax.linalg.ormqr(
            self.reflectors, self.taus, columns[1:], transpose=transpose
        )
        return jnp.concatenate([columns[:1], rest])

    def _tridiagonal_vectors(self, shifts: jax.Array) -> jax.Array:
        """Return unit eigenvectors of T for eigenvalues (c,), as columns (n, c).

        Twisted factorisation: eliminate from both ends, and start the vector where
        the two meet with the smallest pivot, which is where it is largest.

        Source: Dhillon and Parlett, "Orthogonal eigenvectors and relative gaps",
        SIAM J. Matrix Anal. Appl. 25 (2004), section 2.
        """
        ends = jnp.zeros(1, self.off.dtype)
        after = jnp.concatenate([self.off, ends])
        before = jnp.concatenate([ends, self.off])
        down = self._pivots(before, shifts, reverse=False)
        up = self._pivots(after, shifts, reverse=True)
        meeting = down + up - (self.diagonal[:, None] - shifts[None])
        twist = jnp.argmin(jnp.abs(meeting), 0)
        rows = jnp.arange(len(self.diagonal))

        def above(z, row):
            index, off, pivot = row
            z = jnp.where(index < twist, -off * z / pivot, 0.0)
            z = jnp.where(index == twist, 1.0, z)
            return z, z

        def below(z, row):
            index, off, pivot, first = row
            z = jnp.where(index <= twist, first, -off * z / pivot)
            return z, z

        zero = jnp.zeros_like(shifts)
        _, z = lax.scan(above, zero, (rows, after, down), reverse=True, unroll=_UNROLL)
        _, z = lax.scan(below, zero, (rows, before, up, z), unroll=_UNROLL)
        return z / jnp.linalg.norm(z, axis=0)[None]

    def _pivots(
        self, neighbours: jax.Array, shifts: jax.Array, *, reverse: bool
    ) -> jax.Array:
        """Eliminate T - shift from one end: pivots, (n, c), none of them zero."""
        tiny = jnp.finfo(shifts.dtype).tiny
        least = 4 * tiny * jnp.maximum(1.0, jnp.max(neighbours**2))

        def step(pivot, row):
            diagonal, off = row
            pivot = diagonal - shifts - off**2 / pivot
            pivot = jnp.where(jnp.abs(pivot) < least, -least, pivot)
            return pivot, pivot

        rows = (self.diagonal, neighbours)
        start = jnp.ones_like(shifts)
        return lax.scan(step, start, rows, reverse=reverse, unroll=_UNROLL)[1]


def tridiagonalize(gram: jax.Array) -> Tridiagonal:
    """Reduce a symmetric matrix (n, n), n >= 2; only its lower triangle is read."""
    reflectors, diagonal, off, taus = lax.linalg.tridiagonal(gram, lower=True)
    descending = eigenvalues(diagonal, off)[::-1]
    return Tridiagonal(reflectors[1:, :-1], taus, diagonal, off, descending)
