"""Spectra of kernels in float64: the short side's Gram matrix and its eigenvectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.core.wide import Wide


class Dense(NamedTuple):
    """Hold G = P diag(eigenvalues) P^T, n x n, with all of P.

    Answers what `tridiagonal.Tridiagonal` answers, whatever the eigenvalues' gaps.

    Attributes:
      eigenvalues: descending, (n,), float64.
      all_vectors: P, (n, n), float64, or float32 where it was stored.
    """

    eigenvalues: jax.Array
    all_vectors: jax.Array

    def project(self, columns: jax.Array) -> jax.Array:
        """Give P^T columns, (n, c)."""
        return Wide(self.all_vectors).transposed_times(columns)

    def vectors(self, indices: jax.Array) -> jax.Array:
        """Give eigenvectors P[:, indices], (n, c)."""
        return self.all_vectors[:, indices].astype(jnp.float64)

    def combine(self, shares: jax.Array) -> jax.Array:
        """Give P shares, (n, c)."""
        return Wide(self.all_vectors).times(shares)

    def correct(self, residual: jax.Array, indices: jax.Array) -> jax.Array:
        """Solve (lambda_i - G) x_i = residual_i for x_i orthogonal to P_i, (n, c).

        Directions whose eigenvalues cannot be told apart are not mixed.
        """
        gaps = self.eigenvalues[indices][None] - self.eigenvalues[:, None]
        size, eps = len(self.eigenvalues), jnp.finfo(gaps.dtype).eps
        apart = jnp.abs(gaps) > size * eps * self.eigenvalues[0]
        shares = self.project(residual) / jnp.where(apart, gaps, 1.0)
        return self.combine(jnp.where(apart, shares, 0.0))


def null_threshold(sigma: jax.Array, shape: tuple[int, ...], eps: float) -> jax.Array:
    """Bound the numerical null space: max(in, out) * eps * sigma_1.

    The storage type's eps counts, but never more than float32's: a bfloat16 kernel
    is an exact float32 matrix, and bfloat16's eps times a width of a few hundred
    would call every direction null. Nor does a float64 kernel's own eps count: the
    squares in its Gram matrix leave noise of sqrt(max(in, out) * eps) * sigma_1.
    """
    size = max(shape)
    stored = size * min(eps, float(jnp.finfo(jnp.float32).eps))
    return max(stored, math.sqrt(size * float(jnp.finfo(jnp.float64).eps))) * sigma[0]


def diagonalize(lower: jax.Array) -> Dense:
    """Decompose a symmetric matrix (n, n) in full; only its lower triangle is read."""
    vectors, eigenvalues = lax.linalg.eigh(lower, lower=True, symmetrize_input=False)
    return Dense(eigenvalues[::-1], vectors[:, ::-1])
