"""Singular vectors of a few directions, to the accuracy of the matrix itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.deltas import Spectrum
from tsd_jax.extraction.spectra import DenseSpectrum

_CONVERGED, _STEPS = 1e-7, 5  # refinement ends below this correction, or after so many


def refine(
    spectrum: Spectrum, kernel: BlockedMatrix, indices: Int[Array, "c"]
) -> Float[Array, "n c"]:
    """Return eigenvectors, (n, c), to the accuracy of K itself, not of its square.

    Forming G = K K^T rounds by eps sigma_1^2, which mixes directions of small sigma
    with their neighbors by eps sigma_1^2 / gap. The residual K (K^T v) - sigma^2 v has
    no such error, and G's decomposition solves for the correction, which roughly
    squares the error; most often one step is enough.

    Args:
      spectrum: spectrum of K K^T.
      kernel: K, (n, m).
      indices: which eigenvectors, (c,), integers.
    """

    def improve(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        short, _, step = state
        long = kernel.transposed_times(short)
        residual = kernel.times(long) - short * jnp.sum(long**2, 0)[None]
        correction = spectrum.correct(residual, indices)
        short = short + correction
        short = short / jnp.linalg.norm(short, axis=0)[None]
        return short, jnp.max(jnp.linalg.norm(correction, axis=0)), step + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > _CONVERGED) & (state[2] < _STEPS)

    start = (spectrum.vectors(indices), jnp.asarray(jnp.inf), jnp.asarray(0))
    short, _, _ = jax.lax.while_loop(unfinished, improve, start)
    return 1.5 * short - 0.5 * short @ (short.T @ short)  # orthonormal to second order


def complete_null(
    spectrum: DenseSpectrum,
    kernel: BlockedMatrix,
    long: Float[Array, "m c"],
    null: Bool[Array, "c"],
) -> Float[Array, "m c"]:
    """Return `long` with its null columns filled from the null space of K, (m, c).

    The filled columns are cosines, less their part in the row space of K, orthogonal to
    each other and to the columns before them.

    Args:
      spectrum: spectrum of K K^T.
      kernel: K, (n, m).
      long: right singular vectors, (m, c), float64.
      null: which of them to fill, (c,), bool.
    """
    rows, columns = (jnp.arange(size, dtype=long.dtype) for size in long.shape)
    filler = jnp.cos(jnp.outer(rows + 0.5, columns + 1) * (jnp.pi / len(rows)))
    values = spectrum.eigenvalues
    some = values > len(values) * jnp.finfo(values.dtype).eps * values[0]
    coefficients = (
        spectrum.project(kernel.times(filler)) / jnp.where(some, values, 1.0)[:, None]
    )
    inside = spectrum.combine(jnp.where(some[:, None], coefficients, 0.0))
    outside = filler - kernel.transposed_times(inside)
    orthonormal, _ = jnp.linalg.qr(jnp.where(null[None], outside, long))
    return jnp.where(null[None], orthonormal, long)


def column_signs(vectors: Float[Array, "n c"]) -> Float[Array, "1 c"]:
    """Return the signs that make the largest entry of every column positive, (1, c).

    Args:
      vectors: (n, c), float64.
    """
    negative = -jnp.min(vectors, axis=0) > jnp.max(vectors, axis=0)
    return jnp.where(negative, -1.0, 1.0)[None]
