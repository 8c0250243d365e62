"""DoRA's adapters, their merging and their launch, against dense float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tests.helpers.trees import STACKED, random_all, small_spec, trained
from tsd_jax.core.adapter import delta, init, low_rank_factors, merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule, build_spec
from tsd_jax.extraction.launch import Extraction, launch

METHODS = ["dash", "tsd", "tsd+keep"]
methods = pytest.mark.parametrize("method", METHODS)


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def dora(kernel, change, magnitude) -> np.ndarray:
    """Return m o (K + dK) / ||K + dK||, (*batch, in, out)."""
    total = wide(kernel) + wide(change)
    norms = np.linalg.norm(total, axis=-2, keepdims=True)
    return wide(magnitude)[..., None, :] * total / norms


def base(spec, seed=0):
    """Return kernels of falling spectra for the matrices of a spec."""
    params = {}
    for kernel in spec.kernels:
        size = (kernel.fan_in, kernel.fan_out)
        stack = [
            spectrum_kernel(seed + n, size, geometric(min(size), 5.0, 0.1))[0]
            for n in range(int(np.prod(kernel.batch_shape)))
        ]
        params[kernel.path] = jnp.asarray(np.reshape(stack, kernel.shape), jnp.float32)
    return params


def trained_dora(spec, params):
    """Return adapters as pre-launch leaves them: magnitudes 10 % off what they were."""
    trainable, directions = trained(3, spec, 0.2)
    rng = np.random.default_rng(4)
    for path, adapter in trainable.adapters.items():
        norms = np.linalg.norm(wide(params[path]), axis=-2)
        moved = norms * (1 + 0.1 * rng.normal(size=norms.shape))
        trainable.adapters[path] = adapter.replace(
            magnitude=jnp.asarray(moved, jnp.float32)
        )
    return trainable, directions


def kernel_of(params, trainable, directions, path):
    """Return the dense kernel an adapter stands for, in float64."""
    down, up = low_rank_factors(trainable.adapters[path], directions[path])
    change = wide(down) @ wide(up)
    return dora(params[path], change, trainable.adapters[path].magnitude)


def test_magnitudes_start_at_the_norms_of_the_base():
    spec = small_spec("tsd", dora=True)
    params = base(spec)
    trainable, directions = init(jax.random.key(0), spec, params=params)
    plain, _ = init(jax.random.key(0), small_spec("tsd"))
    merged = merge(params, trainable, directions)
    for path, kernel in params.items():
        norms = np.linalg.norm(wide(kernel), axis=-2)
        np.testing.assert_allclose(trainable.adapters[path].magnitude, norms, rtol=1e-6)
        np.testing.assert_allclose(merged[path], kernel, rtol=2e-6)
        np.testing.assert_array_equal(
            trainable.adapters[path].a, plain.adapters[path].a
        )
        assert plain.adapters[path].magnitude is None
    factors = 2 * (6 + 7) + 4
    assert [k.trainable for k in spec.kernels] == [factors + 7, 3 * (factors + 7)]


def test_dora_needs_the_base_to_start_from():
    with pytest.raises(InputError, match=r"^k: DoRA starts at the norms.*give params="):
        init(jax.random.key(0), small_spec("dash", dora=True))


@pytest.mark.parametrize("method", ["lora", "dash", "tsd+keep"])
def test_merged_kernels_are_the_formula(method):
    """Frozen factors and gains count in the norm; a plain kernel beside is as ever."""
    rules = [
        Rule(pattern=p, rank=2, directions=4, dora=p == "k") for p in ("k", "stack")
    ]
    sound = small_spec(method)
    spec = build_spec(
        {"k": (6, 7), "stack": (3, 6, 7)},
        {"k": Layout(), "stack": STACKED},
        dict(zip(("k", "stack"), rules, strict=True)),
        sound.method,
    )
    params = base(spec)
    trainable, directions = random_all(1, spec, 0.5)
    merged = merge(params, trainable, directions)
    want = kernel_of(params, trainable, directions, "k")
    np.testing.assert_allclose(merged["k"], want, rtol=1e-5, atol=1e-5)
    added = delta(trainable.adapters["k"], directions["k"], params["k"])
    np.testing.assert_allclose(added, want - wide(params["k"]), rtol=1e-5, atol=1e-5)
    plain = wide(params["stack"]) + wide(
        delta(trainable.adapters["stack"], directions["stack"])
    )
    np.testing.assert_allclose(merged["stack"], plain, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="k: what DoRA adds depends on the kernel"):
        delta(trainable.adapters["k"], directions["k"])


def test_stored_axes_and_types_are_kept():
    """(out2, layers, in, out1), bfloat16: norms are those of the matrices."""
    layout = Layout((1,), (2,), (3, 0), lifted=(1,))
    spec = small_spec("dash", shape=(2, 3, 6, 4), layout=layout, dora=True)
    kernel = np.random.default_rng(0).normal(size=(2, 3, 6, 4))
    params = {"k": jnp.asarray(kernel, jnp.bfloat16)}
    trainable, directions = random_all(0, spec)
    merged = merge(params, trainable, directions, jnp.float32)["k"]
    matrices = {"k": layout.to_matrices(params["k"])}
    want = kernel_of(matrices, trainable, directions, "k")
    got = layout.to_matrices(merged)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert merge(params, trainable, directions)["k"].dtype == jnp.bfloat16


@functools.cache
def launched(method):
    """Return a problem and its launch, computed once for all tests."""
    spec = small_spec(method, shape=(3, 6, 7), layout=STACKED, dora=True)
    params = base(spec)
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
        low_rank = wide(delta_without(trainable.adapters[path], directions[path]))
        for index in np.ndindex(kernel.batch_shape):
            matrix = wide(params[path])[index]
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
            norms = np.linalg.norm(wide(params[path]), axis=-2)
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
    params = base(spec)
    trainable, directions = trained_dora(spec, params)
    new, frozen, _ = launch(params, trainable, spec)
    kernel = wide(params["k"])
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
    params = base(spec)
    trainable, _ = trained_dora(spec, params)
    change = np.random.default_rng(6).normal(size=(6, 7)).astype(np.float32)
    new, _, report = launch(params, trainable, spec, deltas={"k": jnp.asarray(change)})
    want = core_directions(wide(params["k"]), change)
    np.testing.assert_array_equal(report["k"].indices, want.order[:4])
    norms = np.linalg.norm(wide(params["k"]), axis=0)
    np.testing.assert_allclose(new.adapters["k"].magnitude, norms, rtol=2e-7)
