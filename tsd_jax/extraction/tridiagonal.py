"""A symmetric matrix as Q T Q^T with T tridiagonal; eigenvectors a few at a time.

Ranking needs the projection of a few columns on every eigenvector, and only a few of
the eigenvectors themselves. From the tridiagonal form both cost O(n^2), which saves all
of LAPACK's work after the reduction, two thirds of a full eigendecomposition.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from tsd_jax.extraction.bisection import eigenvalues

_COLUMNS = 256  # eigenvectors of T formed at a time
_UNROLL = 8  # steps of a recurrence in one iteration of its loop
_DISTINCT = 1e-13  # gaps, in units of the largest eigenvalue, that can be told apart


class TridiagonalSpectrum(NamedTuple):
    """A reduction G = Q T Q^T = P diag(eigenvalues) P^T, n x n, float64.

    Attributes:
      reflectors: Q as LAPACK's sytrd returns it, (n - 1, n - 1), without its first row
        and column, which are those of the identity.
      taus: scalar factors of the reflectors, (n - 1,).
      diagonal: diagonal of T, (n,).
      off: subdiagonal of T, (n - 1,).
      eigenvalues: descending, (n,).
    """

    reflectors: Float[Array, "n-1 n-1"]
    taus: Float[Array, "n-1"]
    diagonal: Float[Array, "n"]
    off: Float[Array, "n-1"]
    eigenvalues: Float[Array, "n"]

    def project(self, columns: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """Return P^T @ columns, (n, c), without forming P.

        Args:
          columns: (n, c), float64.
        """
        rotated = self._rotate(columns, transpose=True)
        width = min(_COLUMNS, len(self.diagonal))
        padding = -len(self.diagonal) % width
        shifts = jnp.pad(self.eigenvalues, (0, padding), mode="edge")
        parts = lax.map(
            lambda some: self._tridiagonal_vectors(some).T @ rotated,
            shifts.reshape(-1, width),
        )
        return parts.reshape(-1, columns.shape[1])[: len(self.diagonal)]

    def vectors(self, indices: Int[Array, "c"]) -> Float[Array, "n c"]:
        """Return the eigenvectors P[:, indices], (n, c).

        Args:
          indices: (c,), integers.
        """
        return self._rotate(self._tridiagonal_vectors(self.eigenvalues[indices]))

    def correct(
        self, residual: Float[Array, "n c"], indices: Int[Array, "c"]
    ) -> Float[Array, "n c"]:
        """Solve (lambda_i - G) x_i = residual_i for x_i orthogonal to P_i, (n, c).

        Args:
          residual: right-hand sides, (n, c), float64.
          indices: i of each column, (c,), integers.
        """
        shifts = self.eigenvalues[indices]
        z = self._tridiagonal_vectors(shifts)

        def orthogonal(x: Array) -> Array:
            return x - z * jnp.sum(z * x, 0)[None]

        right = orthogonal(self._rotate(residual, transpose=True))
        # Shifted off the eigenvalue by a few roundings, so that no pivot is zero; what
        # this adds along z is projected out.
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

    def distinct(self, used: Bool[Array, "n"]) -> Bool[Array, ""]:
        """Return whether the eigenvalues that are used can be told apart, ().

        Args:
          used: which eigenvalues are asked about, (n,), bool.
        """
        gaps = self.eigenvalues[:-1] - self.eigenvalues[1:]
        apart = gaps > _DISTINCT * self.eigenvalues[0]
        return jnp.all(apart | ~used[1:]) & (self.eigenvalues[0] > 0)

    def _rotate(self, columns: Array, *, transpose: bool = False) -> Array:
        """Return Q @ columns, or Q^T @ columns."""
        rest = lax.linalg.ormqr(
            self.reflectors, self.taus, columns[1:], transpose=transpose
        )
        return jnp.concatenate([columns[:1], rest])

    def _tridiagonal_vectors(self, shifts: Array) -> Array:
        """Return unit eigenvectors of T for eigenvalues (c,), as columns (n, c).

        Twisted factorization: eliminate from both ends, and start the vector where the
        two meet with the smallest pivot, which is where its entry is largest.

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

    def _pivots(self, neighbours: Array, shifts: Array, *, reverse: bool) -> Array:
        """Return the nonzero pivots of eliminating T - shift from one end, (n, c)."""
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


def tridiagonalize(gram: Float[Array, "n n"]) -> TridiagonalSpectrum:
    """Return a symmetric matrix in tridiagonal form.

    Args:
      gram: the matrix, (n, n), n >= 2, float64; only its lower triangle is read.
    """
    reflectors, diagonal, off, taus = lax.linalg.tridiagonal(gram, lower=True)
    descending = eigenvalues(diagonal, off)[::-1]
    return TridiagonalSpectrum(reflectors[1:, :-1], taus, diagonal, off, descending)
