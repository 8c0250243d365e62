from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.dora import as_float64, falling_kernels, kernel_of
from tests.helpers.trees import STACKED, random_all, random_pair, small_spec
from tsd_jax.core.adapter import Trainable, delta, init, low_rank_factors, merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule, Spec, build_spec

start = jax.jit(init, static_argnums=(1, 2))

METHODS = ["lora", "dash", "init", "tsd", "init+keep", "tsd+keep"]


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_start(method):
    spec = small_spec(method)
    trainable, directions = start(jax.random.key(0), spec)
    assert list(trainable.adapters) == list(directions) == ["k", "stack"]
    for path, batch in (("k", ()), ("stack", (3,))):
        adapter, frozen = trainable.adapters[path], directions[path]
        kernel = adapter.kernel
        assert adapter.a.shape == (*batch, 6, 2)
        assert adapter.b.shape == (*batch, 2, 7)
        np.testing.assert_array_equal(adapter.b, 0)
        if kernel.gains:
            assert adapter.gain.shape == (*batch, 4)
            np.testing.assert_array_equal(adapter.gain, 0)
        else:
            assert adapter.gain is None
        if kernel.columns:
            assert frozen.left.shape == (*batch, 6, kernel.columns)
            assert frozen.right.shape == (*batch, 7, kernel.columns)
            assert frozen.offset.shape == (*batch, kernel.columns)
        for leaf in jax.tree.leaves(frozen):
            np.testing.assert_array_equal(leaf, 0)


def test_a_is_uniform_in_one_over_the_root_of_the_inputs():
    """As PEFT's kaiming_uniform_(a=sqrt(5)): bound 1/sqrt(in), whatever comes out."""
    spec = small_spec("lora", shape=(16, 300), rank=16)
    a = np.asarray(start(jax.random.key(0), spec)[0].adapters["k"].a)
    assert 0.24 < np.abs(a).max() <= 0.25
    np.testing.assert_allclose([a.mean(), a.std()], [0, 0.25 / 3**0.5], atol=0.02)


def test_leaves_are_float32_unless_asked():
    pairs = start(jax.random.key(0), small_spec("tsd"))
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}
    pairs = start(jax.random.key(0), small_spec("tsd"), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("bfloat16")}


def test_init_changes_no_function():
    spec = small_spec("tsd+keep")
    params = {
        k.path: jax.random.normal(jax.random.key(1), k.shape) for k in spec.kernels
    }
    merged = merge(params, *start(jax.random.key(0), spec))
    for path, kernel in params.items():
        np.testing.assert_array_equal(merged[path], kernel)


def test_a_kernels_start_depends_on_key_and_path_alone():
    spec = small_spec("dash")
    both, _ = start(jax.random.key(0), spec)
    alone, _ = start(jax.random.key(0), Spec(spec.kernels[1:], spec.method))
    np.testing.assert_array_equal(both.adapters["stack"].a, alone.adapters["stack"].a)
    assert not np.array_equal(both.adapters["k"].a, both.adapters["stack"].a[0])
    other, _ = start(jax.random.key(1), spec)
    assert not np.array_equal(both.adapters["k"].a, other.adapters["k"].a)


def test_layers_of_a_stack_start_apart():
    trainable, _ = start(jax.random.key(0), small_spec("lora"))
    first, second, third = np.asarray(trainable.adapters["stack"].a)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def expected_delta(adapter, directions) -> np.ndarray:
    """Sum the formula term by term, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b))
    total = adapter.kernel.scale * (a @ b)
    if directions.left is None:
        return total
    for index in np.ndindex(*adapter.kernel.batch_shape):
        for i in range(directions.left.shape[-1]):
            weight = float(directions.offset[(*index, i)])
            if adapter.gain is not None and i < adapter.gain.shape[-1]:
                weight += float(adapter.gain[(*index, i)])
            left = np.asarray(directions.left, np.float64)[(*index, slice(None), i)]
            right = np.asarray(directions.right, np.float64)[(*index, slice(None), i)]
            total[index] += weight * np.outer(left, right)
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["k", "stack"])
def test_factors_multiply_to_the_formula(method, path):
    kernel = next(k for k in small_spec(method).kernels if k.path == path)
    adapter, directions = random_pair(0, kernel)
    down, up = low_rank_factors(adapter, directions)
    assert down.shape[-1] == up.shape[-2] == kernel.rank + kernel.columns
    expected = expected_delta(adapter, directions)
    np.testing.assert_allclose(down @ up, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        delta(adapter, directions), expected, rtol=1e-5, atol=1e-5
    )


def test_delta_is_stored_as_the_kernel_is():
    layout = Layout((1,), (2,), (3, 0))
    kernel = small_spec("tsd", shape=(2, 3, 6, 4), layout=layout).kernels[0]
    adapter, directions = random_pair(1, kernel)
    expected = expected_delta(adapter, directions).reshape(3, 6, 4, 2)
    np.testing.assert_allclose(
        delta(adapter, directions), expected.transpose(3, 0, 1, 2), atol=1e-5
    )


def test_merge_adds_to_adapted_kernels_only():
    kernel = small_spec("tsd").kernels[0]
    adapter, directions = random_pair(2, kernel)
    base = jax.random.normal(jax.random.key(0), (6, 7))
    params = {"k": base, "other": {"bias": jnp.ones(3)}}
    merged = merge(params, Trainable(adapters={"k": adapter}), {"k": directions})
    assert merged["other"]["bias"] is params["other"]["bias"]
    expected = np.asarray(base) + expected_delta(adapter, directions)
    np.testing.assert_allclose(merged["k"], expected, atol=1e-5)
    assert params["k"] is base


def test_merge_into_bfloat16_rounds_once_and_can_widen():
    kernel = small_spec("tsd").kernels[0]
    adapter, directions = random_pair(2, kernel)
    base = jax.random.normal(jax.random.key(0), (6, 7), jnp.bfloat16)
    wide = merge(
        {"k": base},
        Trainable(adapters={"k": adapter}),
        {"k": directions},
        dtype=jnp.float32,
    )
    expected = np.asarray(base, np.float64) + expected_delta(adapter, directions)
    assert wide["k"].dtype == jnp.float32
    np.testing.assert_allclose(wide["k"], expected, atol=1e-5)
    own = merge({"k": base}, Trainable(adapters={"k": adapter}), {"k": directions})
    np.testing.assert_array_equal(own["k"], wide["k"].astype(jnp.bfloat16))
    assert own["k"].dtype == jnp.bfloat16


def test_merge_names_a_missing_kernel():
    kernel = small_spec("lora").kernels[0]
    adapter, directions = random_pair(0, kernel)
    with pytest.raises(InputError, match="no 'k'"):
        merge(
            {"other": jnp.ones((6, 7))},
            Trainable(adapters={"k": adapter}),
            {"k": directions},
        )


def test_magnitudes_start_at_the_norms_of_the_base():
    spec = small_spec("tsd", dora=True)
    params = falling_kernels(spec)
    trainable, directions = init(jax.random.key(0), spec, params=params)
    plain, _ = init(jax.random.key(0), small_spec("tsd"))
    merged = merge(params, trainable, directions)
    for path, kernel in params.items():
        norms = np.linalg.norm(as_float64(kernel), axis=-2)
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
    params = falling_kernels(spec)
    trainable, directions = random_all(1, spec, 0.5)
    merged = merge(params, trainable, directions)
    want = kernel_of(params, trainable, directions, "k")
    np.testing.assert_allclose(merged["k"], want, rtol=1e-5, atol=1e-5)
    added = delta(trainable.adapters["k"], directions["k"], params["k"])
    np.testing.assert_allclose(
        added, want - as_float64(params["k"]), rtol=1e-5, atol=1e-5
    )
    plain = as_float64(params["stack"]) + as_float64(
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
