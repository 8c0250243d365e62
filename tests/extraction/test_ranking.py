from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import RANKINGS
from tsd_jax.extraction.deltas import LowRankDelta
from tsd_jax.extraction.ranking import (
    SCORES,
    Ranked,
    RankSettings,
    rank_directions,
    top_directions,
)
from tsd_jax.extraction.spectra import DenseSpectrum, decompose, null_threshold

SCALE, EPSILON = 2.0, 1e-6
SHAPES = {"square": (40, 40), "wide": (40, 72), "tall": (72, 40)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@functools.partial(jax.jit, static_argnames=("count", "epsilon", "solver"))
def _rank(kernel, a, b, *, count, epsilon, solver="auto"):
    return rank_directions(
        kernel, a, b, scale=SCALE, count=count, epsilon=epsilon, solver=solver
    )


def rank(kernel, a, b, count=8, epsilon=EPSILON, solver="auto") -> Ranked:
    """Rank under the default settings, as `launch` does."""
    assert jnp.asarray(0.5).dtype == jnp.float32
    with jax.enable_x64(True):
        ranked = _rank(kernel, a, b, count=count, epsilon=epsilon, solver=solver)
    return jax.tree.map(np.asarray, ranked)


@jax.jit
def _rank_stored(kernel, a, b):
    """Rank by eigenvectors rounded to float32, as a store gives them."""
    values, vectors = decompose(kernel)
    stored = DenseSpectrum(values, vectors.astype(jnp.float32))
    return rank_directions(kernel, a, b, scale=SCALE, count=8, spectrum=stored)


def rank_stored(kernel, a, b) -> Ranked:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _rank_stored(kernel, a, b))


def problem(seed, shape, sigma, dtype=jnp.float32):
    """Return a stored kernel and factors of a rank-4 change of size 0.1."""
    kernel, _, _ = spectrum_kernel(seed, shape, sigma)
    rng = np.random.default_rng(seed + 100)
    a = jnp.asarray(0.1 * rng.normal(size=(shape[0], 4)), jnp.float32)
    b = jnp.asarray(0.1 * rng.normal(size=(4, shape[1])), jnp.float32)
    return jnp.asarray(kernel, dtype), a, b


def oracle(kernel, a, b, epsilon=EPSILON):
    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in (kernel, a, b)]
    return core_directions(wide[0], SCALE * wide[1] @ wide[2], epsilon)


@shapes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_full_svd(shape, dtype, seed):
    """On a spectrum like a pretrained kernel's, where small sigma decide."""
    kernel, a, b = problem(seed, shape, geometric(40), dtype)
    got, want = rank(kernel, a, b), oracle(kernel, a, b)
    top = want.order[:8]
    np.testing.assert_array_equal(got.indices, top)
    np.testing.assert_allclose(got.sigma, want.sigma, rtol=1e-8)
    # The last rates of a square kernel hang on the smallest sigma.
    np.testing.assert_allclose(got.rates, want.rates, rtol=1e-6)
    np.testing.assert_allclose(got.chosen, want.sigma[top], rtol=1e-8)
    assert {x.dtype for x in got if x is not got.indices} == {np.dtype("float64")}
    assert got.indices.dtype == np.int32
    ours = np.einsum("ic,oc->cio", got.left, got.right)
    theirs = np.einsum("ic,oc->cio", want.P[:, top], want.Q[:, top])
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@shapes
def test_vectors_are_orthonormal(shape):
    got = rank(*problem(3, shape, geometric(40)), count=40)
    np.testing.assert_allclose(got.left.T @ got.left, np.eye(40), atol=1e-9)
    np.testing.assert_allclose(got.right.T @ got.right, np.eye(40), atol=1e-9)
    assert sorted(got.indices) == list(range(40))


@shapes
def test_signs_do_not_hang_on_the_solver(shape):
    """The short side's largest entry is positive, whatever eigh gives."""
    got = rank(*problem(3, shape, geometric(40)), count=40)
    short = np.asarray(got.left if shape[0] <= shape[1] else got.right)
    largest = np.take_along_axis(short, np.abs(short).argmax(0)[None], 0)
    assert (largest > 0).all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, jnp.float32) for shape in SHAPES.values()), ((40, 72), jnp.bfloat16)],
)
def test_the_null_space_ranks_last(shape, dtype):
    """Half the directions are null; the change lies in them most of all."""
    sigma = np.where(np.arange(40) < 20, geometric(40, 10, 1), 0.0)
    kernel, a, b = problem(4, shape, sigma)
    if dtype == jnp.bfloat16:  # entries of few bits, so that rounding keeps the rank
        rng = np.random.default_rng(0)
        parts = [rng.integers(-2, 3, size=(n, 5)) for n in shape]
        kernel = jnp.asarray(parts[0] @ parts[1].T, dtype)
    count = int((oracle(kernel, a, b).sigma > 1e-4).sum())
    got = rank(kernel, a, b, count=40)
    assert count == (5 if dtype == jnp.bfloat16 else 20)
    assert set(got.indices[:count].tolist()) == set(range(count))
    np.testing.assert_array_equal(got.rates[count:], 0)
    np.testing.assert_array_equal(got.chosen[count:], 0)
    want = oracle(kernel, a, b)
    order = np.argsort(-want.rates[:count])
    np.testing.assert_array_equal(got.indices[:count], order)
    assert all(np.isfinite(leaf).all() for leaf in got)


@shapes
def test_a_zero_kernel_is_all_null(shape):
    _, a, b = problem(5, shape, geometric(40))
    got = rank(jnp.zeros(shape), a, b)
    for leaf in (got.sigma, got.rates, got.chosen):
        np.testing.assert_array_equal(leaf, 0)
    assert all(np.isfinite(leaf).all() for leaf in got)


def test_no_change_gives_zero_rates():
    kernel, a, b = problem(6, (40, 72), geometric(40))
    got = rank(kernel, a, jnp.zeros_like(b))
    np.testing.assert_array_equal(got.rates, 0)
    assert len(set(got.indices.tolist())) == 8


def test_epsilon_bounds_the_rates_of_small_directions():
    kernel, a, b = problem(7, (48, 48), geometric(48, 10, 1e-3))
    for epsilon in (1e-6, 1e-1, 10.0):
        want = oracle(kernel, a, b, epsilon)
        got = rank(kernel, a, b, epsilon=epsilon)
        np.testing.assert_allclose(got.rates, want.rates, rtol=1e-5)
        np.testing.assert_array_equal(got.indices, want.order[:8])


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_the_smallest_matrices(shape):
    kernel, a, b = problem(8, shape, np.array([3.0]))
    got, want = rank(kernel, a, b, count=1), oracle(kernel, a, b)
    np.testing.assert_allclose(got.rates, want.rates, rtol=1e-6)
    np.testing.assert_array_equal(got.indices, [0])


def test_a_float64_kernel_has_a_null_space_too():
    """The Gram matrix knows sigma to 1e-8 of the first only, whatever the type."""
    sigma = np.where(np.arange(40) < 20, geometric(40, 10, 1), 0.0)
    kernel, _, _ = spectrum_kernel(9, (40, 72), sigma)
    _, a, b = problem(9, (40, 72), sigma)
    got = rank(kernel, a, b, count=40)
    assert set(got.indices[:20].tolist()) == set(range(20))
    np.testing.assert_array_equal(got.rates[20:], 0)


def test_refuses_to_work_in_float32():
    kernel, a, b = problem(0, (8, 8), geometric(8))
    with pytest.raises(TypeError, match="enable_x64"):
        _rank(kernel, a, b, count=2, epsilon=EPSILON)
    with pytest.raises(TypeError, match="enable_x64"):
        rank_directions(kernel, a, b, scale=SCALE, count=2, epsilon=EPSILON)


def test_there_is_a_score_for_every_ranking():
    assert tuple(SCORES) == RANKINGS


def test_settings_are_refused_by_name():
    with pytest.raises(InputError, match="unknown ranking 'best'; choose one of rates"):
        RankSettings(count=2, ranking="best")
    with pytest.raises(InputError, match="unknown solver 'qr'; choose one of auto, de"):
        RankSettings(count=2, solver="qr")
    kernel, a, b = problem(0, (8, 8), geometric(8))
    with (
        jax.enable_x64(True),
        pytest.raises(InputError, match="'random' needs noise="),
    ):
        rank_directions(kernel, a, b, scale=SCALE, count=2, ranking="random")


@shapes
@pytest.mark.parametrize("ranking", ["rates", "largest", "smallest"])
def test_the_top_directions_are_those_of_the_ranking(shape, ranking):
    kernel, a, b = problem(1, shape, geometric(40))
    settings = RankSettings(count=6, ranking=ranking)
    with jax.enable_x64(True):
        delta = LowRankDelta(a, b, SCALE)
        got = top_directions(kernel, delta, decompose(kernel), settings)
    want = oracle(kernel, a, b)
    order = {"rates": want.order, "largest": np.arange(40)}
    order["smallest"] = order["largest"][::-1]
    np.testing.assert_array_equal(got, order[ranking][:6])
    assert got.dtype == jnp.int32


WAYS = {
    "dense": functools.partial(rank, solver="dense"),
    "tridiagonal": functools.partial(rank, solver="tridiagonal"),
    "stored": rank_stored,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def heavy(k):
    """Independent draws of a heavy tail: large values, and some close together."""
    draws = np.minimum(0.05 / np.random.default_rng(0).random(k), 100)
    return np.sort(draws)[::-1]


SPECTRA = {
    "geometric to 1e-2": geometric(96),
    "geometric to 1e-4": geometric(96, 10, 1e-4),
    "heavy": heavy(96),
    "gaussian": None,
}


@ways
@pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("shape", [(96, 96), (150, 96)], ids=str)
def test_sets_and_vectors_are_exact(way, sigma, shape):
    """Float64 NumPy's, wherever the rates at the cut differ by 1e-6."""
    rng = np.random.default_rng(11)
    if sigma is None:
        kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
        _, a, b = problem(0, shape, geometric(96))
    else:
        kernel, a, b = problem(11, shape, sigma)
    got, want = way(kernel, a, b), oracle(kernel, a, b)
    eps = float(jnp.finfo(jnp.float32).eps)
    null = want.sigma <= np.asarray(null_threshold(jnp.asarray(want.sigma), shape, eps))
    rates = np.where(null, -1, want.rates)
    order = np.argsort(-rates, kind="stable")
    assert rates[order[7]] > rates[order[8]] * (1 + 1e-6) > 0
    np.testing.assert_array_equal(got.indices, order[:8])
    np.testing.assert_allclose(got.rates[order[:8]], rates[order[:8]], rtol=1e-6)
    ours = np.einsum("ic,oc->cio", got.left, got.right)
    theirs = np.einsum("ic,oc->cio", want.P[:, order[:8]], want.Q[:, order[:8]])
    np.testing.assert_allclose(ours, theirs, atol=1e-7)
    moved = np.diag(want.P.T @ (SCALE * np.asarray(a, float) @ np.asarray(b)) @ want.Q)
    np.testing.assert_allclose(got.moved, moved[order[:8]], rtol=1e-6)


@ways
@pytest.mark.parametrize("shape", [(24, 24), (40, 24)], ids=str)
@pytest.mark.parametrize(
    "sigma",
    [np.ones(24), np.repeat([3.0, 1.0], 12), np.zeros(24), np.eye(24)[0]],
    ids=["orthogonal", "two values", "zero", "rank one"],
)
def test_degenerate_kernels(way, shape, sigma):
    """Finite, orthonormal, the same again, of the null space last."""
    kernel, a, b = problem(12, shape, sigma)
    got, again = way(kernel, a, b), way(kernel, a, b)
    for x, y in zip(got, again, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)
    for side in (got.left, got.right):
        np.testing.assert_allclose(side.T @ side, np.eye(8), atol=1e-6)
    product = got.left.T @ np.asarray(kernel, np.float64) @ got.right
    np.testing.assert_allclose(np.diag(product), got.chosen, atol=1e-6)
    rank_of = int((sigma > 0).sum())
    assert set(got.indices[:rank_of].tolist()) <= set(range(rank_of))
    np.testing.assert_array_equal(got.chosen[rank_of:], 0)


def kernels_of(folder):
    """Return every matrix of a checkpoint of at least 32 rows and columns."""
    from safetensors.numpy import load_file

    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2 and min(tensor.shape) >= 32 and "embed" not in name:
            yield name, tensor.T.astype(np.float32)


def assert_exact(kernel, seed):
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.normal(0, 0.02, (kernel.shape[0], 8)), jnp.float32)
    b = jnp.asarray(rng.normal(0, 0.02, (8, kernel.shape[1])), jnp.float32)
    kernel = jnp.asarray(kernel)
    want = oracle(kernel, a, b)
    null = want.sigma <= float(
        null_threshold(jnp.asarray(want.sigma), kernel.shape, 2.0**-23)
    )
    order = np.argsort(-np.where(null, -1, want.rates), kind="stable")
    gap = want.rates[order[7]] / want.rates[order[8]] - 1
    assert gap > 1e-6
    for solver in ("dense", "tridiagonal"):
        got = rank(kernel, a, b, solver=solver)
        np.testing.assert_array_equal(got.indices, order[:8])
        overlap = np.abs(np.sum(got.left * want.P[:, order[:8]], 0))
        np.testing.assert_allclose(overlap, 1, atol=1e-9)


@pytest.mark.slow
@pytest.mark.shared
def test_every_kernel_of_a_real_decoder(shared):
    names = [
        assert_exact(kernel, seed)
        for seed, (_, kernel) in enumerate(kernels_of(shared / "models" / "stories3M"))
    ]
    assert len(names) == 42
