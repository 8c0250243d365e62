from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.dora import as_float64, falling_kernels
from tests.helpers.trees import small_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Spec

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
