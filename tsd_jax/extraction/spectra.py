"""Spectra of kernels in float64: the short side's Gram matrix and its eigenvectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.extraction.blocked import BlockedMatrix


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
        """Return P^T columns, (n, c)."""
        return BlockedMatrix(self.all_vectors).transposed_times(columns)

    def vectors(self, indices: jax.Array) -> jax.Array:
        """Return eigenvectors P[:, indices], (n, c)."""
        return self.all_vectors[:, indices].astype(jnp.float64)

    def combine(self, shares: jax.Array) -> jax.Array:
        """Return P shares, (n, c)."""
        return BlockedMatrix(self.all_vectors).times(shares)

    def correct(self, residual: jax.Array, indices: jax.Array) -> jax.Array:
        """Solve (lambda_i - G) x_i = residual_i for x_i orthogonal to P_i, (n, c).

        Directions whose eigenvalues cannot be told apart are not mixed.
        """
        gaps = self.eigenvalues[indices][None] - self.eigenvalues[:, None]
        noise = 4 * len(gaps) ** 0.5 * jnp.finfo(gaps.dtype).eps
        apart = jnp.abs(gaps) > noise * self.eigenvalues[0]
        shares = self.project(residual) / jnp.where(apart, gaps, 1.0)
        return self.combine(jnp.where(apart, shares, 0.0))


def null_threshold(sigma: jax.Array, shape: tuple[int, ...], eps: float) -> jax.Array:
    """Bound the numerical null space: eps ||K||_F.

    Rounding to the storage type moves K by at most eps / 2 ||K||_F, and with it every
    singular value. The usual max(in, out) eps sigma_1 is hundreds of times that, and
    would take sound directions of small sigma, where task-specific ones are, for null.
    A bfloat16 kernel is an exact float32 matrix and counts as one. Under
    sqrt(max(in, out) eps_64) sigma_1 the Gram matrix knows nothing, whatever the type.

    Args:
      sigma: descending, (k,). shape: of the kernel. eps: of its storage type.
    """
    stored = min(eps, float(jnp.finfo(jnp.float32).eps)) * jnp.linalg.norm(sigma)
    known = math.sqrt(max(shape) * float(jnp.finfo(jnp.float64).eps)) * sigma[0]
    return jnp.maximum(stored, known)


def diagonalize(lower: jax.Array) -> Dense:
    """Decompose a symmetric matrix (n, n) in full; only its lower triangle is read."""
    vectors, eigenvalues = lax.linalg.eigh(lower, lower=True, symmetrize_input=False)
    return Dense(eigenvalues[::-1], vectors[:, ::-1])
