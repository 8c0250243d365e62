"""Spectra, change rates and the directions they rank first, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ranked(NamedTuple):
    """Hold what the ranking of one matrix gives; float64.

    Attributes:
      sigma: all singular values, descending, (k,), k = min(in, out).
      rates: change rate of every core direction, (k,); 0 in the numerical null space.
      indices: the directions ranked first, best first, (c,), int32.
      left: P_I, (in, c). right: Q_I, (out, c). chosen: sigma_I, (c,).
    """

    sigma: jax.Array
    rates: jax.Array
    indices: jax.Array
    left: jax.Array
    right: jax.Array
    chosen: jax.Array


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


def _short_side(
    kernel: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decompose K K^T (in <= out), and project AB on every core direction.

    G = K K^T = P diag(sigma^2) P^T and p_i = (P_i^T A)(B K^T P_i) / sigma_i: the long
    side's singular vectors are never formed.

    Returns:
      sigma (k,) descending, P (in, k), and sigma_i p_i (k,).
    """
    squares, vectors = jnp.linalg.eigh(kernel @ kernel.T)
    sigma = jnp.sqrt(jnp.maximum(squares, 0.0))[::-1]
    vectors = vectors[:, ::-1]
    return sigma, vectors, jnp.sum((vectors.T @ a) * ((b @ kernel.T) @ vectors).T, -1)


def _signed(vectors: jax.Array) -> jax.Array:
    """Make the largest entry of every column positive: a sign to rely on."""
    negative = -jnp.min(vectors, axis=0) > jnp.max(vectors, axis=0)
    return vectors * jnp.where(negative, -1.0, 1.0)[None]


def rank_directions(
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float,
    count: int,
    epsilon: float,
) -> Ranked:
    """Rank a matrix's core directions by change rate and give the first ones.

        K = P diag(sigma) Q^T,  p_i = gamma P_i^T A B Q_i,
        rho_i = |p_i| / (sigma_i + epsilon)

    Works on the short side's Gram matrix in float64, where squaring still leaves
    small singular values enough digits; in float32 it ranks noise. Directions with
    sigma_i <= `null_threshold` come last.

    Args:
      kernel: K, (in, out), any float type.
      a: A, (in, r). b: B, (r, out). scale: gamma.
      count: how many directions to give.
      epsilon: keeps the rate finite (paper, section 3).

    Raises:
      TypeError: 64-bit types are off, so that float64 would silently be float32.

    Source: arXiv:2409.01035, definitions 3 and 4.
    """
    if jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise TypeError("rank_directions needs `with jax.enable_x64(True):` around it")
    eps = float(jnp.finfo(kernel.dtype).eps)
    kernel, a, b = (x.astype(jnp.float64) for x in (kernel, a, b))
    shape = kernel.shape
    wide = shape[0] <= shape[1]
    if not wide:
        kernel, a, b = kernel.T, b.T, a.T
    sigma, vectors, raw = _short_side(kernel, a, b)
    null = sigma <= null_threshold(sigma, shape, eps)
    safe = jnp.where(null, 1.0, sigma)
    rates = jnp.where(null, 0.0, jnp.abs(scale * raw / safe) / (sigma + epsilon))
    _, indices = jax.lax.top_k(jnp.where(null, -1.0, rates), count)
    short = _signed(vectors[:, indices])
    long = kernel.T @ short
    chosen = jnp.where(null[indices], 0.0, jnp.linalg.norm(long, axis=0))
    inverse = jnp.where(chosen > 0, 1 / jnp.where(chosen > 0, chosen, 1.0), 0.0)
    long = long * inverse[None]
    left, right = (short, long) if wide else (long, short)
    return Ranked(sigma, rates, indices.astype(jnp.int32), left, right, chosen)
