"""Change rates of core directions, and the directions ranked first, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from tsd_jax.core.errors import InputError, check_choice
from tsd_jax.core.ranges import Positive, check_ranges
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.deltas import Delta, LowRankDelta, Spectrum
from tsd_jax.extraction.refinement import column_signs, complete_null, refine
from tsd_jax.extraction.spectra import (
    DenseSpectrum,
    diagonalize,
    null_threshold,
    require_float64,
)
from tsd_jax.extraction.tridiagonal import TridiagonalSpectrum, tridiagonalize

EPSILON = 1e-6
_SPARE = 8  # directions refined beyond those asked for
_SMALL = 512  # up to here a full decomposition takes no time worth saving

SOLVERS = ("auto", "dense", "tridiagonal")
"""How the Gram matrix may be decomposed: see `RankSettings.solver`."""

Score = Callable[[Array, Array, Any], Any]
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
"""A score for each of `core.methods.RANKINGS`."""


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """How directions are ranked and how many are returned; static under jit.

    Attributes:
      count: number of directions to return.
      epsilon: keeps the change rate |p_i| / (sigma_i + epsilon) finite (paper,
        section 3).
      ranking: a key of SCORES.
      solver: one of SOLVERS. "dense" is a full eigendecomposition; "tridiagonal" forms
        only the eigenvectors asked for, and falls back to "dense" where eigenvalues
        cannot be told apart; "auto" is the faster of them at this size on a CPU. Only
        low-rank deltas have the choice; the others always use "dense".

    Raises:
      InputError: the ranking or the solver is unknown, or epsilon is out of range.
    """

    count: int
    epsilon: Positive = EPSILON
    ranking: str = "rates"
    solver: str = "auto"

    def __post_init__(self):
        """Refuse unknown names, and an epsilon that is none."""
        check_ranges(self)
        check_choice("ranking", self.ranking, SCORES)
        check_choice("solver", self.solver, SOLVERS)


class Ranked(NamedTuple):
    """The ranking of one matrix; float64.

    Attributes:
      sigma: all singular values, descending, (k,), k = min(in, out).
      rates: change rate of every core direction, (k,); 0 in the numerical null space.
      indices: the directions ranked first, best first, (c,), int32.
      left: P_I, (in, c), orthonormal, null directions too.
      right: Q_I, (out, c), orthonormal, null directions too.
      chosen: sigma_I, (c,); 0 in the numerical null space.
      moved: p_I = P_I^T dK Q_I, (c,).
    """

    sigma: Float[Array, "k"]
    rates: Float[Array, "k"]
    indices: Int[Array, "c"]
    left: Float[Array, "in c"]
    right: Float[Array, "out c"]
    chosen: Float[Array, "c"]
    moved: Float[Array, "c"]


class _Problem(NamedTuple):
    """A matrix and its delta from the short side, with the matrix's storage epsilon."""

    kernel: BlockedMatrix
    delta: Delta
    eps: float


def _problem(kernel: Float[Array, "in out"], delta: Delta) -> _Problem:
    require_float64()
    blocked, delta = BlockedMatrix(kernel), delta.as_float64
    return _Problem(
        blocked,
        delta.transposed if blocked.tall else delta,
        float(jnp.finfo(kernel.dtype).eps),
    )


def rank_directions(
    kernel: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    *,
    scale: float,
    count: int,
    epsilon: float = EPSILON,
    ranking: str = "rates",
    noise: Float[Array, "k"] | None = None,
    solver: str = "auto",
    spectrum: DenseSpectrum | None = None,
) -> Ranked:
    """Rank a matrix's core directions by change rate and return the first ones.

        K = P diag(sigma) Q^T,  p_i = gamma P_i^T A B Q_i,
        rho_i = |p_i| / (sigma_i + epsilon)

    Works on the short side's Gram matrix in float64, where squaring still leaves small
    singular values enough digits; in float32 it would rank noise. The directions that
    may come first are then refined against K itself. Those with sigma_i <=
    `null_threshold` come last.

    Args:
      kernel: K, (in, out), any float type.
      a: A, (in, r).
      b: B, (r, out).
      scale: gamma.
      count: number of directions to return.
      epsilon: see `RankSettings`.
      ranking: see `RankSettings`.
      noise: what "random" ranks by, (k,).
      solver: see `RankSettings`.
      spectrum: spectrum of the short side's Gram matrix, where it is already known.

    Raises:
      TypeError: 64-bit types are off, so that float64 would silently be float32.
      InputError: the ranking or solver is unknown, or "random" has no noise.

    Source: arXiv:2409.01035, definitions 3 and 4.
    """
    settings = RankSettings(
        count=count, epsilon=epsilon, ranking=ranking, solver=solver
    )
    delta = LowRankDelta(a, b, scale)
    return rank_delta(kernel, delta, settings, noise=noise, spectrum=spectrum)


def rank_delta(
    kernel: Float[Array, "in out"],
    delta: Delta,
    settings: RankSettings,
    *,
    noise: Float[Array, "k"] | None = None,
    spectrum: DenseSpectrum | None = None,
) -> Ranked:
    """Rank by any delta dK: as `rank_directions`, with p_i = P_i^T dK Q_i.

    Args:
      kernel: K, (in, out), any float type.
      delta: dK, (in, out).
      settings: how to rank.
      noise: what "random" ranks by, (k,).
      spectrum: spectrum of the short side's Gram matrix, where it is already known.

    Raises:
      TypeError: 64-bit types are off, so that float64 would silently be float32.
      InputError: the ranking is "random" and there is no noise.
    """
    problem = _problem(kernel, delta)
    blocked = problem.kernel

    def rank(spectrum: Spectrum) -> Ranked:
        return _rank_spectrum(spectrum, problem, noise, settings)

    if spectrum is not None:
        ranked = rank(spectrum)
    elif _uses_dense(problem, settings):
        ranked = rank(diagonalize(blocked.gram()))
    else:
        tridiagonal = tridiagonalize(blocked.gram())
        ranked = jax.lax.cond(
            _trusted(tridiagonal, problem, settings.count),
            lambda: rank(tridiagonal),
            lambda: rank(diagonalize(blocked.gram())),
        )
    if blocked.tall:
        ranked = ranked._replace(left=ranked.right, right=ranked.left)
    return ranked


def _uses_dense(problem: _Problem, settings: RankSettings) -> bool:
    """Return whether the Gram matrix is decomposed in full."""
    if not isinstance(problem.delta, LowRankDelta):
        return True
    if settings.solver == "auto":
        return problem.kernel.shape[0] <= _SMALL
    return settings.solver == "dense"


def top_directions(
    kernel: Float[Array, "in out"],
    delta: Delta,
    spectrum: DenseSpectrum,
    settings: RankSettings,
) -> Int[Array, "c"]:
    """Return the indices of the directions ranked first, best first, (c,), int32.

    The same ranking without refinement, where the spectrum is known: cheap enough to
    repeat every few steps.

    Args:
      kernel: K, (in, out), any float type.
      delta: dK, (in, out).
      spectrum: spectrum of the short side's Gram matrix.
      settings: how to rank; the solver is not used.

    Raises:
      TypeError: 64-bit types are off, so that float64 would silently be float32.
      InputError: the ranking is "random", which needs noise.
    """
    problem = _problem(kernel, delta)
    sigma, null, rates = _all_rates(spectrum, problem, settings.epsilon)
    _, indices = jax.lax.top_k(
        _scores(settings, sigma, rates, null, None), settings.count
    )
    return indices.astype(jnp.int32)


def _singular_values(
    spectrum: Spectrum, problem: _Problem
) -> tuple[Float[Array, "k"], Bool[Array, "k"]]:
    """Return sigma, and which of them are null."""
    sigma = jnp.sqrt(jnp.maximum(spectrum.eigenvalues, 0.0))
    return sigma, sigma <= null_threshold(sigma, problem.kernel.shape, problem.eps)


def _rates(
    products: Float[Array, "c"],
    sigma: Float[Array, "c"],
    null: Bool[Array, "c"],
    epsilon: float,
) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Return p_i and rho_i from sigma_i p_i; 0 in the numerical null space."""
    moved = jnp.where(null, 0.0, products / jnp.where(null, 1.0, sigma))
    return moved, jnp.abs(moved) / (sigma + epsilon)


def _all_rates(
    spectrum: Spectrum, problem: _Problem, epsilon: float
) -> tuple[Float[Array, "k"], Bool[Array, "k"], Float[Array, "k"]]:
    """Return sigma, which of them are null, and every change rate, unrefined."""
    sigma, null = _singular_values(spectrum, problem)
    products = problem.delta.products(spectrum, problem.kernel)
    _, rates = _rates(products, sigma, null, epsilon)
    return sigma, null, rates


def _scores(
    settings: RankSettings,
    sigma: Float[Array, "k"],
    rates: Float[Array, "k"],
    null: Bool[Array, "k"],
    noise: Float[Array, "k"] | None,
) -> Float[Array, "k"]:
    """Return what directions are ranked by, highest first; null ones come last."""
    scores = SCORES[settings.ranking](sigma, rates, noise)
    if scores is None:
        raise InputError(f"ranking {settings.ranking!r} needs noise=, one number each")
    return jnp.where(null, -jnp.inf, scores)


def _rank_spectrum(
    spectrum: Spectrum,
    problem: _Problem,
    noise: Float[Array, "k"] | None,
    settings: RankSettings,
) -> Ranked:
    """Rank a matrix (n, m), n <= m, whose K K^T is decomposed.

    p_i = P_i^T dK (K^T P_i) / sigma_i for every i from one projection; those that may
    come first are refined and ranked again.
    """
    kernel = problem.kernel
    sigma, null, rates = _all_rates(spectrum, problem, settings.epsilon)
    spare = min(settings.count + _SPARE, len(sigma))
    _, near = jax.lax.top_k(_scores(settings, sigma, rates, null, noise), spare)
    short = refine(spectrum, kernel, near)
    long = kernel.transposed_times(short)
    norms = jnp.linalg.norm(long, axis=0)
    products = problem.delta.products_of(short, long)
    moved, refined = _rates(products, norms, null[near], settings.epsilon)
    sigma, rates = sigma.at[near].set(norms), rates.at[near].set(refined)

    scores = _scores(settings, sigma, rates, null, noise)
    _, order = jax.lax.top_k(scores[near], settings.count)
    indices, empty = near[order], null[near][order]
    signs = column_signs(short[:, order])
    short = signs * short[:, order]
    long = signs * long[:, order] / jnp.where(empty, 1.0, norms[order])[None]
    if isinstance(spectrum, DenseSpectrum):
        dense = spectrum
        long = jax.lax.cond(
            jnp.any(empty),
            lambda: complete_null(dense, kernel, long, empty),
            lambda: long,
        )
    chosen = jnp.where(empty, 0.0, norms[order])
    return Ranked(
        sigma, rates, indices.astype(jnp.int32), short, long, chosen, moved[order]
    )


def _trusted(
    spectrum: TridiagonalSpectrum, problem: _Problem, count: int
) -> Bool[Array, ""]:
    """Return whether the directions to be refined are not null and stand apart."""
    sigma, null = _singular_values(spectrum, problem)
    enough = jnp.sum(~null) >= min(count + _SPARE, len(sigma))
    return enough & spectrum.distinct(~null)
