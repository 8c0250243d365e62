"""Delta rates of core directions, and the directions ranked first, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsd_jax.core.errors import check_choice
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.deltas import Delta, LowRankDelta, Spectrum
from tsd_jax.extraction.spectra import Dense, diagonalize, null_threshold
from tsd_jax.extraction.tridiagonal import Tridiagonal, tridiagonalize

EPSILON = 1e-6
_SPARE = 8  # directions looked at closely beyond those asked for
_SETTLED, _STEPS = 1e-7, 5  # refinement ends below this correction, or there
_SMALL = 512  # up to here a full decomposition takes no time worth saving


class Ranked(NamedTuple):
    """Hold what the ranking of one matrix gives; float64.

    Attributes:
      sigma: all singular values, descending, (k,), k = min(in, out).
      rates: change rate of every core direction, (k,); 0 in the numerical null space.
      indices: the directions ranked first, best first, (c,), int32.
      left: P_I, (in, c). right: Q_I, (out, c); orthonormal, null directions too.
      chosen: sigma_I, (c,); 0 in the numerical null space.
      moved: p_I = P_I^T dK Q_I, (c,).
    """

    sigma: jax.Array
    rates: jax.Array
    indices: jax.Array
    left: jax.Array
    right: jax.Array
    chosen: jax.Array
    moved: jax.Array


Score = Callable[[jax.Array, jax.Array, Any], Any]
"""(sigma, rates, noise) -> what directions are ranked by, highest first; all (k,)."""

SCORES: dict[str, Score] = {
    # Task-specific directions: arXiv:2409.01035, definition 4.
    "rates": lambda sigma, rates, noise: rates,
    # PiSSA, arXiv:2404.02948: the principal directions.
    "largest": lambda sigma, rates, noise: sigma,
    # MiLoRA, arXiv:2406.09044: the minor ones.
    "smallest": lambda sigma, rates, noise: -sigma,
    # A control: any directions.
    "random": lambda sigma, rates, noise: noise,
}


def refine(spectrum: Spectrum, kernel: BlockedMatrix, indices: jax.Array) -> jax.Array:
    """Return eigenvectors (n, c) to the accuracy of K itself, not of its square.

    Forming G = K K^T rounds by eps sigma_1^2, which turns directions of small sigma
    into their neighbours by eps sigma_1^2 / gap. The residual K (K^T v) - sigma^2 v
    has no such error, and G's decomposition solves for the correction, which about
    squares the error; most often one is enough.

    Args:
      spectrum: of K K^T. kernel: K, (n, m). indices: (c,).
    """

    def improve(state: tuple[jax.Array, jax.Array, jax.Array]):
        short, _, step = state
        long = kernel.transposed_times(short)
        residual = kernel.times(long) - short * jnp.sum(long**2, 0)[None]
        change = spectrum.correct(residual, indices)
        short = short + change
        short = short / jnp.linalg.norm(short, axis=0)[None]
        return short, jnp.max(jnp.linalg.norm(change, axis=0)), step + 1

    def unsettled(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[1] > _SETTLED) & (state[2] < _STEPS)

    start = (spectrum.vectors(indices), jnp.asarray(jnp.inf), jnp.asarray(0))
    short, _, _ = jax.lax.while_loop(unsettled, improve, start)
    return 1.5 * short - 0.5 * short @ (short.T @ short)  # orthonormal to second order


def _signs(vectors: jax.Array) -> jax.Array:
    """Return what makes the largest entry of every column positive, (1, c)."""
    negative = -jnp.min(vectors, axis=0) > jnp.max(vectors, axis=0)
    return jnp.where(negative, -1.0, 1.0)[None]


def _complete(
    spectrum: Dense, kernel: BlockedMatrix, long: jax.Array, null: jax.Array
) -> jax.Array:
    """Fill the columns of `long` (m, c) marked null from the null space of K.

    Cosines, less their share in the row space of K, made orthogonal to each other
    and to the columns before them.
    """
    rows, columns = (jnp.arange(size, dtype=long.dtype) for size in long.shape)
    filler = jnp.cos(jnp.outer(rows + 0.5, columns + 1) * (jnp.pi / len(rows)))
    values = spectrum.eigenvalues
    some = values > len(values) * jnp.finfo(values.dtype).eps * values[0]
    shares = (
        spectrum.project(kernel.times(filler)) / jnp.where(some, values, 1.0)[:, None]
    )
    inside = spectrum.combine(jnp.where(some[:, None], shares, 0.0))
    outside = filler - kernel.transposed_times(inside)
    orthonormal, _ = jnp.linalg.qr(jnp.where(null[None], outside, long))
    return jnp.where(null[None], orthonormal, long)


def _rates(
    products: jax.Array, sigma: jax.Array, null: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Return p_i and rho_i from sigma_i p_i; 0 in the numerical null space."""
    moved = jnp.where(null, 0.0, products / jnp.where(null, 1.0, sigma))
    return moved, jnp.abs(moved) / (sigma + epsilon)


def _rank_wide(
    spectrum: Spectrum,
    kernel: BlockedMatrix,
    change: Delta,
    noise: jax.Array | None,
    *,
    count: int,
    epsilon: float,
    eps: float,
    ranking: str,
) -> Ranked:
    """Rank a matrix (n, m), n <= m, whose K K^T is decomposed.

    p_i = P_i^T dK (K^T P_i) / sigma_i for every i from one projection; those that may
    come first are refined and ranked again.
    """
    sigma = jnp.sqrt(jnp.maximum(spectrum.eigenvalues, 0.0))
    null = sigma <= null_threshold(sigma, kernel.shape, eps)

    def score(sigma: jax.Array, rates: jax.Array) -> jax.Array:
        scores = SCORES[ranking](sigma, rates, noise)
        return jnp.where(null, -jnp.inf, scores)

    _, rates = _rates(change.products(spectrum, kernel), sigma, null, epsilon)
    spare = min(count + _SPARE, len(sigma))
    _, near = jax.lax.top_k(score(sigma, rates), spare)
    short = refine(spectrum, kernel, near)
    long = kernel.transposed_times(short)
    norms = jnp.linalg.norm(long, axis=0)
    products = change.products_of(short, long)
    moved, close = _rates(products, norms, null[near], epsilon)
    sigma, rates = sigma.at[near].set(norms), rates.at[near].set(close)

    _, order = jax.lax.top_k(score(sigma, rates)[near], count)
    indices, empty = near[order], null[near][order]
    signs = _signs(short[:, order])
    short = signs * short[:, order]
    long = signs * long[:, order] / jnp.where(empty, 1.0, norms[order])[None]
    if isinstance(spectrum, Dense):
        dense = spectrum
        long = jax.lax.cond(
            jnp.any(empty), lambda: _complete(dense, kernel, long, empty), lambda: long
        )
    chosen = jnp.where(empty, 0.0, norms[order])
    return Ranked(
        sigma, rates, indices.astype(jnp.int32), short, long, chosen, moved[order]
    )


def rank_directions(
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    scale: float,
    count: int,
    epsilon: float = EPSILON,
    ranking: str = "rates",
    noise: jax.Array | None = None,
    solver: str = "auto",
    spectrum: Dense | None = None,
) -> Ranked:
    """Rank a matrix's core directions by change rate and give the first ones.

        K = P diag(sigma) Q^T,  p_i = gamma P_i^T A B Q_i,
        rho_i = |p_i| / (sigma_i + epsilon)

    Works on the short side's Gram matrix in float64, where squaring still leaves
    small singular values enough digits; in float32 it ranks noise. The directions
    that may come first are then refined against K itself. Those with sigma_i <=
    `null_threshold` come last.

    Args:
      kernel: K, (in, out), any float type.
      a: A, (in, r). b: B, (r, out). scale: gamma.
      count: how many directions to give.
      epsilon: keeps the rate finite (paper, section 3).
      ranking: a name of SCORES. noise: (k,), what "random" ranks by.
      solver: "dense", a full eigendecomposition; "tridiagonal", which forms only the
        eigenvectors asked for, and falls back to "dense" where eigenvalues cannot be
        told apart; "auto", the faster of them at this size on a CPU.
      spectrum: of the short side's Gram matrix, where it is known already.

    Raises:
      TypeError: 64-bit types are off, so that float64 would silently be float32.
      InputError: no such ranking.

    Source: arXiv:2409.01035, definitions 3 and 4.
    """
    return rank_delta(
        kernel,
        LowRankDelta(a, b, scale),
        count=count,
        epsilon=epsilon,
        ranking=ranking,
        noise=noise,
        solver=solver,
        spectrum=spectrum,
    )


def _check_float64() -> None:
    if jax.dtypes.canonicalize_dtype(jnp.float64) != jnp.float64:
        raise TypeError("rank_directions needs `with jax.enable_x64(True):` around it")


def rank_delta(
    kernel: jax.Array,
    change: Delta,
    *,
    count: int,
    epsilon: float = EPSILON,
    ranking: str = "rates",
    noise: jax.Array | None = None,
    solver: str = "auto",
    spectrum: Dense | None = None,
) -> Ranked:
    """Rank by any change dK: as `rank_directions`, with p_i = P_i^T dK Q_i.

    Args:
      kernel: K, (in, out), any float type.
      change: dK, (in, out). Only a `LowRankDelta` one has a choice of solvers; the others
        take the dense one.
      count, epsilon, ranking, noise, solver, spectrum: see `rank_directions`.
    """
    _check_float64()
    check_choice("ranking", ranking, SCORES)
    eps = float(jnp.finfo(kernel.dtype).eps)
    wide, change = BlockedMatrix(kernel), change.wide
    if wide.tall:
        change = change.transposed

    def finish(spectrum: Spectrum) -> Ranked:
        return _rank_wide(
            spectrum,
            wide,
            change,
            noise,
            count=count,
            epsilon=epsilon,
            eps=eps,
            ranking=ranking,
        )

    if not isinstance(change, LowRankDelta):
        solver = "dense"
    elif solver == "auto":
        solver = "tridiagonal" if wide.shape[0] > _SMALL else "dense"
    if spectrum is not None:
        ranked = finish(spectrum)
    elif solver == "dense":
        ranked = finish(diagonalize(wide.gram()))
    else:
        few = tridiagonalize(wide.gram())
        ranked = jax.lax.cond(
            _trusted(few, kernel.shape, eps, count),
            lambda: finish(few),
            lambda: finish(diagonalize(wide.gram())),
        )
    if wide.tall:
        ranked = ranked._replace(left=ranked.right, right=ranked.left)
    return ranked


def top_directions(
    kernel: jax.Array,
    change: Delta,
    spectrum: Dense,
    *,
    count: int,
    epsilon: float = EPSILON,
) -> jax.Array:
    """Return the indices of the `count` largest change rates, (count,) int32, unrefined.

    What remains of a ranking where the spectrum is known: cheap enough to be asked
    every few steps.

    Args:
      kernel: K, (in, out). change: dK. spectrum: of the short side's Gram matrix.
    """
    _check_float64()
    eps = float(jnp.finfo(kernel.dtype).eps)
    wide, change = BlockedMatrix(kernel), change.wide
    if wide.tall:
        change = change.transposed
    sigma = jnp.sqrt(jnp.maximum(spectrum.eigenvalues, 0.0))
    null = sigma <= null_threshold(sigma, kernel.shape, eps)
    _, rates = _rates(change.products(spectrum, wide), sigma, null, epsilon)
    _, indices = jax.lax.top_k(jnp.where(null, -jnp.inf, rates), count)
    return indices.astype(jnp.int32)


def decompose(kernel: jax.Array) -> Dense:
    """Decompose the short side's Gram matrix of K (in, out) in full, in float64."""
    _check_float64()
    return diagonalize(BlockedMatrix(kernel).gram())


def _trusted(
    spectrum: Tridiagonal, shape: tuple[int, ...], eps: float, count: int
) -> jax.Array:
    """Return whether the directions to be looked at are not null and stand apart."""
    sigma = jnp.sqrt(jnp.maximum(spectrum.eigenvalues, 0.0))
    used = sigma > null_threshold(sigma, shape, eps)
    enough = jnp.sum(used) >= min(count + _SPARE, len(sigma))
    return enough & spectrum.distinct(used)
