"""The launch of adapters with DoRA, against dense float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.dora import as_float64, falling_kernels, kernel_of, trained_dora
from tests.helpers.oracle import core_directions
from tests.helpers.trees import STACKED, small_spec
from tsd_jax.core.adapter import delta, merge
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.settings import Extraction

METHODS = ["dash", "tsd", "tsd+keep"]
methods = pytest.mark.parametrize("method", METHODS)


@functools.cache
def launched(method):
    """Return a problem and its launch, computed once for all tests."""
    spec = small_spec(method, shape=(3, 6, 7), layout=STACKED, dora=True)
    params = falling_kernels(spec)
    trainable, directions = trained_dora(spec, params)
    return spec, params, trainable, directions, launch(params, trainable, spec)


@methods
def test_directions_are_ranked_by_all_that_changed(method):
    """By dW = c o (K + dK) - K, magnitudes and all."""
    spec, params, trainable, directions, (_, _, report) = launched(method)
    other = 0
    for kernel in spec.kernels:
        path, count = kernel.path, kernel.ranked
        after = kernel_of(params, trainable, directions, path)
        low_rank = as_float64(delta_without(trainable.adapters[path], directions[path]))
        for index in np.ndindex(kernel.batch_shape):
            matrix = as_float64(params[path])[index]
            want = core_directions(matrix, after[index] - matrix)
            np.testing.assert_array_equal(
                report[path].indices[index], want.order[:count]
            )
            np.testing.assert_allclose(report[path].rates[index], want.rates, rtol=2e-5)
            plain = core_directions(matrix, low_rank[index])
            other += set(plain.order[:count]) != set(want.order[:count])
    assert other, "otherwise magnitudes had no say"


def delta_without(adapter, directions):
    """Return gamma A B alone."""
    kernel = dataclasses.replace(adapter.kernel, dora=False)
    return delta(adapter.replace(magnitude=None, kernel=kernel), directions)


@methods
def test_the_kernel_after_launch(method):
    """dash: as it was, bit for bit; keep: to rounding; else the pretrained one."""
    spec, params, trainable, directions, (new, frozen, _) = launched(method)
    after, before = merge(params, new, frozen), merge(params, trainable, directions)
    for path in spec.paths:
        assert np.abs(before[path] - params[path]).max() > 1e-2
        if method == "dash":
            np.testing.assert_array_equal(after[path], before[path])
        want = params[path] if method == "tsd" else before[path]
        np.testing.assert_allclose(after[path], want, atol=5e-6)


@methods
def test_magnitudes_after_launch(method):
    """They go on, or start again where all that was learned is dropped."""
    spec, params, trainable, _, (new, _, _) = launched(method)
    for path in spec.paths:
        if method == "tsd":
            norms = np.linalg.norm(as_float64(params[path]), axis=-2)
            np.testing.assert_allclose(new.adapters[path].magnitude, norms, rtol=2e-7)
            assert new.adapters[path].magnitude.dtype == jnp.float32
        else:
            assert new.adapters[path].magnitude is trainable.adapters[path].magnitude


def test_on_the_hosts_it_is_the_same():
    spec, params, trainable, _, want = launched("tsd")
    got = launch(params, trainable, spec, extraction=Extraction(where="hosts"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_start_at_sigma_and_change_is_that_kernel():
    """K + sum p_i P_i Q_i^T, of all that had changed; its norms are the magnitudes."""
    spec = small_spec("init", shape=(7, 6), dora=True)
    method = dataclasses.replace(spec.method, start="sigma+p")
    spec = dataclasses.replace(spec, method=method)
    params = falling_kernels(spec)
    trainable, directions = trained_dora(spec, params)
    new, frozen, _ = launch(params, trainable, spec)
    kernel = as_float64(params["k"])
    change = kernel_of(params, trainable, directions, "k") - kernel
    seen = core_directions(kernel, change)
    top = seen.order[:2]
    moved = np.diag(seen.P.T @ change @ seen.Q)[top]
    want = kernel + (seen.P[:, top] * moved) @ seen.Q[:, top].T
    np.testing.assert_allclose(merge(params, new, frozen)["k"], want, atol=1e-5)
    norms = np.linalg.norm(want, axis=0)
    np.testing.assert_allclose(new.adapters["k"].magnitude, norms, rtol=1e-5)


def test_gradients_rank_beside_dora_as_without():
    """A gradient is what it is; magnitudes start again all the same."""
    spec = small_spec("tsd", shape=(6, 7), dora=True)
    params = falling_kernels(spec)
    trainable, _ = trained_dora(spec, params)
    change = np.random.default_rng(6).normal(size=(6, 7)).astype(np.float32)
    new, _, report = launch(params, trainable, spec, deltas={"k": jnp.asarray(change)})
    want = core_directions(as_float64(params["k"]), change)
    np.testing.assert_array_equal(report["k"].indices, want.order[:4])
    norms = np.linalg.norm(as_float64(params["k"]), axis=0)
    np.testing.assert_allclose(new.adapters["k"].magnitude, norms, rtol=2e-7)
