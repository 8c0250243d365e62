"""Spectra of kernels in float64: the short side's Gram matrix and its eigenvectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, dtypes, lax
from jaxtyping import Float, Int

from tsd_jax.extraction.blocked import BlockedMatrix


class DenseSpectrum(NamedTuple):
    """A full decomposition G = P diag(eigenvalues) P^T, n x n.

    Has the methods of `tridiagonal.TridiagonalSpectrum`, and works whatever the gaps
    between eigenvalues.

    Attributes:
      eigenvalues: descending, (n,), float64.
      all_vectors: P, (n, n), float64, or float32 where it comes from a store.
    """

    eigenvalues: Float[Array, "n"]
    all_vectors: Float[Array, "n n"]

    def project(self, columns: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """Return P^T @ columns, (n, c).

        Args:
          columns: (n, c), float64.
        """
        return BlockedMatrix(self.all_vectors).transposed_times(columns)

    def vectors(self, indices: Int[Array, "c"]) -> Float[Array, "n c"]:
        """Return the eigenvectors P[:, indices], (n, c), float64.

        Args:
          indices: (c,), integers.
        """
        return self.all_vectors[:, indices].astype(jnp.float64)

    def combine(self, coefficients: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """Return P @ coefficients, (n, c).

        Args:
          coefficients: (n, c), float64.
        """
        return BlockedMatrix(self.all_vectors).times(coefficients)

    def correct(
        self, residual: Float[Array, "n c"], indices: Int[Array, "c"]
    ) -> Float[Array, "n c"]:
        """Solve (lambda_i - G) x_i = residual_i for x_i orthogonal to P_i, (n, c).

        Directions whose eigenvalues cannot be told apart are not mixed.

        Args:
          residual: right-hand sides, (n, c), float64.
          indices: i of each column, (c,), integers.
        """
        gaps = self.eigenvalues[indices][None] - self.eigenvalues[:, None]
        noise = 4 * len(gaps) ** 0.5 * jnp.finfo(gaps.dtype).eps
        apart = jnp.abs(gaps) > noise * self.eigenvalues[0]
        coefficients = self.project(residual) / jnp.where(apart, gaps, 1.0)
        return self.combine(jnp.where(apart, coefficients, 0.0))


def null_threshold(
    sigma: Float[Array, "k"], shape: tuple[int, ...], eps: float
) -> Float[Array, ""]:
    """Return the singular value up to which directions count as null: eps ||K||_F.

    Rounding to the storage type changes K by at most eps / 2 ||K||_F, and with it every
    singular value. The usual max(in, out) eps sigma_1 is hundreds of times larger, and
    would count sound directions of small sigma, where task-specific ones are, as null.
    A bfloat16 kernel is an exact float32 matrix and is treated as one. Below
    sqrt(max(in, out) eps_64) sigma_1 the Gram matrix has no correct digit, whatever the
    storage type.

    Args:
      sigma: singular values, descending, (k,).
      shape: shape of the kernel.
      eps: machine epsilon of its storage type.
    """
    stored = min(eps, float(jnp.finfo(jnp.float32).eps)) * jnp.linalg.norm(sigma)
    known = math.sqrt(max(shape) * float(jnp.finfo(jnp.float64).eps)) * sigma[0]
    return jnp.maximum(stored, known)


def diagonalize(lower: Float[Array, "n n"]) -> DenseSpectrum:
    """Return the full decomposition of a symmetric matrix.

    Args:
      lower: the matrix, (n, n), float64; only its lower triangle is read.
    """
    vectors, eigenvalues = lax.linalg.eigh(lower, lower=True, symmetrize_input=False)
    return DenseSpectrum(eigenvalues[::-1], vectors[:, ::-1])


def decompose(kernel: Float[Array, "in out"]) -> DenseSpectrum:
    """Return the full spectrum of the short side's Gram matrix, in float64.

    Args:
      kernel: K, (in, out), any float type.

    Raises:
      TypeError: 64-bit types are off.
    """
    require_float64()
    return diagonalize(BlockedMatrix(kernel).gram())


def require_float64() -> None:
    """Raise TypeError where 64-bit types are off and float64 would become float32."""
    if dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise TypeError(
            "directions are ranked in float64: put `with jax.enable_x64(True):` around "
            "the call"
        )
