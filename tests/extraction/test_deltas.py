from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.deltas import (
    DenseDelta,
    DoraDelta,
    LowRankDelta,
    learned_delta,
    matrix_norms,
)
from tsd_jax.extraction.ranking import RankSettings, rank_delta, rank_directions
from tsd_jax.extraction.tridiagonal import tridiagonalize

SHAPES = {"square": (20, 20), "wide": (20, 33), "tall": (33, 20)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def problem(shape):
    """Return a kernel of falling spectrum, and a change of full rank."""
    kernel, _, _ = spectrum_kernel(0, shape, geometric(20))
    change = np.random.default_rng(1).normal(size=shape)
    return kernel.astype(np.float32), change.astype(np.float32)


@shapes
@pytest.mark.parametrize("solver", ["auto", "tridiagonal"])
def test_a_full_change_is_ranked_as_defined(shape, solver):
    """Whatever solver is asked for: it needs the dense one, and takes it."""
    kernel, change = problem(shape)
    with jax.enable_x64(True):
        got = rank_delta(
            jnp.asarray(kernel),
            DenseDelta(jnp.asarray(change)),
            RankSettings(count=6, solver=solver),
        )
    want = core_directions(kernel, change)
    top = want.order[:6]
    np.testing.assert_array_equal(got.indices, top)
    np.testing.assert_allclose(got.rates, want.rates, rtol=1e-6)
    moved = np.diag(want.P.T @ change.astype(np.float64) @ want.Q)[top]
    np.testing.assert_allclose(got.moved, moved, rtol=1e-6)


@shapes
def test_both_kinds_of_a_change_say_the_same(shape):
    kernel, _ = problem(shape)
    rng = np.random.default_rng(2)
    a = jnp.asarray(rng.normal(size=(shape[0], 3)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(3, shape[1])), jnp.float32)
    with jax.enable_x64(True):
        full = DenseDelta(2.0 * a.astype(jnp.float64) @ b.astype(jnp.float64))
        one = rank_delta(jnp.asarray(kernel), full, RankSettings(count=5))
        other = rank_directions(jnp.asarray(kernel), a, b, scale=2.0, count=5)
        third = rank_delta(
            jnp.asarray(kernel), LowRankDelta(a, b, 2.0), RankSettings(count=5)
        )
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.rates, other.rates, rtol=1e-7)
    np.testing.assert_allclose(one.moved, other.moved, rtol=1e-7)
    np.testing.assert_array_equal(third.rates, other.rates)


def test_a_full_change_cannot_be_seen_without_all_vectors():
    kernel, change = problem((20, 33))
    with jax.enable_x64(True):
        few = tridiagonalize(BlockedMatrix(jnp.asarray(kernel)).gram())
        with pytest.raises(TypeError, match="dense spectrum"):
            DenseDelta(jnp.asarray(change)).as_float64.products(
                few, BlockedMatrix(jnp.asarray(kernel))
            )


def rescaled(shape):
    """Return a kernel, A, B, c and DoRA's change of it, (K + 2 A B) diag(c) - K."""
    kernel, _ = problem(shape)
    rng = np.random.default_rng(4)
    a, b = 0.1 * rng.normal(size=(shape[0], 3)), 0.1 * rng.normal(size=(3, shape[1]))
    c = 1 + 0.1 * rng.normal(size=shape[1])
    return kernel, a, b, c, (kernel + 2 * a @ b) * c - kernel


@shapes
def test_the_change_of_dora_is_ranked_as_defined(shape):
    """To the digits of float64, for directions of every size."""
    kernel, a, b, c, change = rescaled(shape)
    with jax.enable_x64(True):
        parts = DoraDelta.of(jnp.asarray(a), jnp.asarray(b), 2.0, jnp.asarray(c))
        got = rank_delta(
            jnp.asarray(kernel), parts, RankSettings(count=6, solver="tridiagonal")
        )
    want = core_directions(kernel, change)
    np.testing.assert_array_equal(got.indices, want.order[:6])
    np.testing.assert_allclose(got.rates, want.rates, rtol=1e-6)
    moved = np.diag(want.P.T @ change @ want.Q)[want.order[:6]]
    np.testing.assert_allclose(got.moved, moved, rtol=1e-6)


@pytest.mark.parametrize("shape", [(150, 170), (170, 150)], ids=["wide", "tall"])
def test_more_directions_than_are_looked_at_together(shape):
    kernel, _, _ = spectrum_kernel(0, shape, geometric(150))
    _, a, b, c, _ = rescaled(shape)
    change = (kernel + 2 * a @ b) * c - kernel
    with jax.enable_x64(True):
        parts = DoraDelta.of(jnp.asarray(a), jnp.asarray(b), 2.0, jnp.asarray(c))
        got = rank_delta(jnp.asarray(kernel), parts, RankSettings(count=6))
    want = core_directions(kernel, change)
    np.testing.assert_allclose(got.rates, want.rates, rtol=1e-6, atol=1e-9)


def test_what_was_learned_with_dora():
    """m over the norms of K + gamma A B; gamma A B alone without m."""
    kernel, a, b, _, _ = rescaled((20, 33))
    magnitude = np.random.default_rng(5).uniform(1, 2, 33)
    norms = np.linalg.norm(kernel + 2 * a @ b, axis=0)
    with jax.enable_x64(True):
        matrix, first, second = (jnp.asarray(x) for x in (kernel, a, b))
        plain = learned_delta(matrix, first, second, 2.0)
        whole = learned_delta(matrix, first, second, 2.0, jnp.asarray(magnitude))
    assert isinstance(plain, LowRankDelta)
    assert isinstance(whole, DoraDelta)
    np.testing.assert_allclose(whole.excess, magnitude / norms - 1, rtol=1e-12)


def test_the_change_of_dora_cannot_be_seen_without_all_vectors():
    kernel, a, b, c, _ = rescaled((20, 33))
    with jax.enable_x64(True):
        few = tridiagonalize(BlockedMatrix(jnp.asarray(kernel)).gram())
        parts = DoraDelta.of(jnp.asarray(a), jnp.asarray(b), 2.0, jnp.asarray(c))
        with pytest.raises(TypeError, match="dense spectrum"):
            parts.products(few, BlockedMatrix(jnp.asarray(kernel)))


@pytest.mark.parametrize("shape", [(70, 200), (200, 70)], ids=["wide", "tall"])
def test_norms_in_float64(shape):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=shape).astype(np.float32)
    down, up = rng.normal(size=(shape[0], 3)), rng.normal(size=(3, shape[1]))
    with jax.enable_x64(True):
        got = matrix_norms(jnp.asarray(kernel), jnp.asarray(down), jnp.asarray(up))
        assert got.dtype == jnp.float64
    want = np.linalg.norm(kernel.astype(np.float64) + down @ up, axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-13)
