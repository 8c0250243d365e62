from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tests.helpers.trees import small_spec, trained
from tsd_jax.core.adapter import delta, merge
from tsd_jax.core.initialization import init
from tsd_jax.core.layout import Layout
from tsd_jax.extraction.knee import knee
from tsd_jax.extraction.launch import launch

METHODS = ["dash", "init", "tsd", "init+keep", "tsd+keep"]
methods = pytest.mark.parametrize("method", METHODS)
cases = pytest.mark.parametrize(
    ("shape", "rank", "directions"),
    [((6, 9), 2, 4), ((9, 6), 3, 2), ((3, 6, 9), 2, 4)],
    ids=["wide", "tall", "stack"],
)


def problem(method, shape, rank=2, directions=4, dtype=jnp.float32, auto=False):
    """Return kernels of falling spectra, and trained A and B beside them."""
    *batch, m, n = shape
    spec = small_spec(
        method,
        shape=shape,
        layout=Layout((0,), (1,), (2,), lifted=(0,)) if batch else Layout(),
        rank=rank,
        directions=directions,
        auto=auto,
    )
    kernels = [
        spectrum_kernel(seed, (m, n), geometric(min(m, n)))[0]
        for seed in range(math.prod(batch))
    ]
    params = {"k": jnp.asarray(np.reshape(kernels, shape), dtype)}
    return spec, params, trained(0, spec)[0]


def oracle(params, trainable, epsilon=1e-6):
    """Decompose every matrix of the stack: {index: core directions}."""
    kernel = np.asarray(params["k"].astype(jnp.float32), np.float64)
    adapter = trainable.adapters["k"]
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    change = adapter.kernel.scale * (a @ b)
    return {
        index: core_directions(kernel[index], change[index], epsilon)
        for index in np.ndindex(kernel.shape[:-2])
    }


@functools.cache
def launched(method, shape, rank=2, directions=4):
    """Return a problem and its launch, computed once for all tests."""
    spec, params, trainable = problem(method, shape, rank, directions)
    return spec, params, trainable, *launch(params, trainable, spec)


@cases
@methods
def test_what_is_launched(method, shape, rank, directions):
    """Every new leaf against its definition; signs of the directions are free."""
    spec, params, trainable, new, frozen, report = launched(
        method, shape, rank, directions
    )
    restart, keep = spec.method.restart, spec.method.keep
    ranked = max(directions * spec.method.gains, rank * restart)
    for index, want in oracle(params, trainable).items():
        top = want.order[:ranked]
        np.testing.assert_array_equal(report["k"].indices[index], top)
        np.testing.assert_allclose(report["k"].sigma[index], want.sigma, rtol=1e-5)
        np.testing.assert_allclose(report["k"].rates[index], want.rates, rtol=1e-5)

        left, right = frozen["k"].left[index], frozen["k"].right[index]
        outer = np.einsum("ic,oc->cio", left[:, :ranked], right[:, :ranked])
        expected = np.einsum("ic,oc->cio", want.P[:, top], want.Q[:, top])
        np.testing.assert_allclose(outer, expected, atol=1e-6)

        sigma = want.sigma[top[:rank]] * restart
        offset = np.zeros(ranked)
        offset[: len(sigma)] = -sigma
        offset = [*offset, *np.ones(rank * keep)]
        np.testing.assert_allclose(frozen["k"].offset[index], offset, rtol=1e-6)

        gamma = new.adapters["k"].kernel.scale
        product = gamma * np.asarray(
            new.adapters["k"].a[index] @ new.adapters["k"].b[index]
        )
        old = gamma * np.asarray(
            trainable.adapters["k"].a[index] @ trainable.adapters["k"].b[index]
        )
        if keep:
            kept = np.asarray(left[:, ranked:] @ right[:, ranked:].T)
            np.testing.assert_allclose(kept, old, atol=1e-7)
        if restart:
            first = np.einsum("c,cio->io", sigma, expected[:rank])
            np.testing.assert_allclose(product, first, atol=1e-5)
            root = np.sqrt(want.sigma[top[:rank]] / gamma)
            norms = np.linalg.norm(new.adapters["k"].a[index], axis=0)
            np.testing.assert_allclose(norms, root, rtol=1e-5)
            norms = np.linalg.norm(new.adapters["k"].b[index], axis=1)
            np.testing.assert_allclose(norms, root, rtol=1e-5)


@methods
def test_leaves_keep_shapes_and_types(method):
    """No shape changes at launch, and no float64 leaves it."""
    spec, _, _, new, frozen, report = launched(method, (3, 6, 9))
    before = jax.eval_shape(lambda: init(jax.random.key(0), spec))

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds((new, frozen)) == kinds(before)
    assert {report["k"].sigma.dtype, report["k"].rates.dtype} == {jnp.dtype("float32")}
    assert report["k"].indices.dtype == jnp.int32


@pytest.mark.parametrize("method", ["dash", "tsd", "tsd+keep"])
@pytest.mark.parametrize("rank", [2, 4])
def test_every_matrix_uses_what_stands_before_its_knee(method, rank):
    """Gains behind the gate, and directions that nothing needs, are zero."""
    spec, params, trainable = problem(method, (3, 9, 12), rank, 4, auto=True)
    fixed, _, _ = problem(method, (3, 9, 12), rank, 4)
    new, frozen, report = launch(params, trainable, spec)
    _, whole, plain = launch(params, trainable, fixed)
    assert plain["k"].used is None
    assert whole["k"].gate is None
    np.testing.assert_array_equal(report["k"].indices, plain["k"].indices)
    used = np.asarray(report["k"].used)
    assert used.shape == (3, 1)
    for (layer,), want in oracle(params, trainable).items():
        count = int(knee(jnp.asarray(want.rates), 4))
        assert used[layer, 0] == count
        np.testing.assert_array_equal(frozen["k"].gate[layer], np.arange(4) < count)
        live = max(count, rank * spec.method.restart)
        ranked = spec.kernels[0].ranked
        for got, full in (("left", whole["k"].left), ("right", whole["k"].right)):
            columns = np.asarray(getattr(frozen["k"], got)[layer])
            np.testing.assert_array_equal(columns[:, live:ranked], 0)
            np.testing.assert_array_equal(columns[:, :live], full[layer][:, :live])
            np.testing.assert_array_equal(columns[:, ranked:], full[layer][:, ranked:])
    np.testing.assert_array_equal(frozen["k"].offset, whole["k"].offset)
    assert used.min() < 4, "otherwise this tests nothing"
    start = jax.eval_shape(lambda: init(jax.random.key(0), spec))
    assert jax.tree.map(jnp.shape, (new, frozen)) == jax.tree.map(jnp.shape, start)


@pytest.mark.parametrize("method", ["dash", "tsd"])
def test_gains_behind_the_gate_have_no_gradient(method):
    spec, params, trainable = problem(method, (3, 9, 12), 4, 4, auto=True)
    new, frozen, report = launch(params, trainable, spec)

    def size(gain):
        return jnp.sum(delta(new.adapters["k"].replace(gain=gain), frozen["k"]) ** 2)

    grads = np.asarray(jax.grad(size)(new.adapters["k"].gain + 0.5))
    behind = np.arange(4) >= np.asarray(report["k"].used)
    assert behind.any()
    assert (grads[behind] == 0).all()
    assert (grads[~behind] != 0).all()


def delta_of(trainable):
    adapter = trainable.adapters["k"]
    return np.asarray(adapter.kernel.scale) * np.matmul(adapter.a, adapter.b)


@methods
def test_gains_start_at_zero(method):
    spec, params, trainable = problem(method, (6, 9))
    new, _, _ = launch(params, trainable, spec)
    gain = new.adapters["k"].gain
    assert (gain is None) if not spec.method.gains else (np.asarray(gain) == 0).all()


@cases
@methods
def test_the_kernel_seen_after_launch(method, shape, rank, directions):
    """dash, keep: as before; init, tsd: the pretrained one."""
    spec, params, trainable, new, frozen, _ = launched(method, shape, rank, directions)
    before = np.asarray(params["k"]) + delta_of(trainable)
    dropped = spec.method.restart and not spec.method.keep
    want = np.asarray(params["k"]) if dropped else before
    after = merge(params, new, frozen)["k"]
    np.testing.assert_allclose(after, want, atol=5e-6)
    assert np.abs(before - np.asarray(params["k"])).max() > 1e-2


@methods
def test_a_bfloat16_kernel_is_ranked_as_the_matrix_it_is(method):
    spec, params, trainable = problem(method, (6, 9), dtype=jnp.bfloat16)
    new, frozen, report = launch(params, trainable, spec)
    (want,) = oracle(params, trainable).values()
    count = spec.kernels[0].ranked
    np.testing.assert_array_equal(report["k"].indices, want.order[:count])
    np.testing.assert_allclose(report["k"].sigma, want.sigma, rtol=1e-5)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((new, frozen))}
    assert dtypes == {jnp.dtype("float32")}


@pytest.mark.parametrize("method", ["tsd", "tsd+keep"])
def test_degenerate_kernels_give_finite_numbers(method):
    """A zero matrix, one of rank 2, and a sound one, in one stack."""
    spec, params, trainable = problem(method, (3, 6, 9))
    kernel = np.array(params["k"])
    kernel[0] = 0
    kernel[1] = np.outer(kernel[2, :, 0], kernel[2, 0]) + np.eye(6, 9)[0][None]
    params = {"k": jnp.asarray(kernel)}
    new, frozen, report = launch(params, trainable, spec)
    for leaf in jax.tree.leaves((new, frozen, report)):
        assert np.isfinite(leaf).all()
    kept = delta_of(trainable) * spec.method.keep
    after = merge(params, new, frozen)["k"]
    np.testing.assert_allclose(after, kernel + kept, atol=1e-5)


def test_epsilon_is_a_setting():
    spec, params, trainable = problem("dash", (6, 9))
    _, _, report = launch(params, trainable, spec, epsilon=5.0)
    (want,) = oracle(params, trainable, epsilon=5.0).values()
    (usual,) = oracle(params, trainable).values()
    np.testing.assert_allclose(report["k"].rates, want.rates, rtol=1e-5)
    np.testing.assert_array_equal(report["k"].indices, want.order[:4])
    assert want.order[:4].tolist() != usual.order[:4].tolist()
