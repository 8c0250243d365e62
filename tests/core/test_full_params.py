from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.trees import random_all, small_spec, trained
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import (
    Full,
    FullParam,
    FullSpec,
    full_spec,
    place_full,
    start_full,
)
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule, Spec, match_rules
from tsd_jax.extraction.launch import launch

NORM = FullSpec(path="norm/scale", shape=(5,))
ROWS = FullSpec(path="embed/embedding", shape=(7, 3), rows=(4, 6))
COLUMNS = FullSpec(path="head/kernel", shape=(3, 7), rows=(5, 7), axis=1)
PARTS = (NORM, ROWS, COLUMNS)


def base(dtype: str = "float32") -> dict:
    rng = np.random.default_rng(0)
    leaves = {
        part.path.split("/")[0]: {
            part.path.split("/")[1]: jnp.asarray(rng.normal(size=part.shape), dtype)
        }
        for part in PARTS
    }
    kernels = {
        kernel.path: jnp.asarray(rng.normal(size=kernel.shape), jnp.float32)
        for kernel in small_spec("tsd").kernels
    }
    return leaves | kernels


def spec_with_full_params(method: str = "tsd") -> Spec:
    spec = small_spec(method)
    return Spec(spec.kernels, spec.method, PARTS)


def test_what_trains_is_counted():
    assert [part.value_shape for part in PARTS] == [(5,), (2, 3), (3, 2)]
    assert [part.trainable for part in PARTS] == [5, 6, 6]
    assert spec_with_full_params().trainable == small_spec("tsd").trainable + 17
    assert spec_with_full_params().paths == ("k", "stack")
    assert hash(spec_with_full_params()) == hash(spec_with_full_params())


def test_rules_of_both_kinds_stand_in_one_list_and_the_first_wins():
    paths = ["q/kernel", "q/bias", "norm/scale"]
    kernel, whole = Rule(pattern=".*/kernel"), Full(pattern=".*")
    matched = match_rules(paths, [kernel, whole])
    assert matched == {"q/kernel": kernel, "q/bias": whole, "norm/scale": whole}
    with pytest.raises(InputError, match="matches only what earlier rules took"):
        match_rules(paths, [whole, kernel])
    with pytest.raises(InputError, match="'norm' matches no parameter; the nearest"):
        match_rules(paths, [kernel, Full(pattern="norm")])
    with pytest.raises(InputError, match="name at least one kernel to adapt"):
        match_rules(paths, [whole])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pattern": "("}, "rule '\\(': not a regular expression"),
        ({"pattern": "x", "rows": (2, 2)}, "0 <= start < stop, not \\(2, 2\\)"),
        ({"pattern": "x", "rows": (-1, 2)}, "0 <= start < stop"),
        ({"pattern": "x", "rows": (1, 2), "axis": -1}, "axis must be 0 or more"),
    ],
)
def test_impossible_rules_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        Full(**settings)


def test_a_parameter_must_be_a_float_array_with_such_rows():
    leaf = jax.ShapeDtypeStruct((7, 3), jnp.bfloat16)
    rule = Full(pattern="x", rows=(4, 6))
    assert full_spec("embed/embedding", leaf, rule) == ROWS
    with pytest.raises(InputError, match=r"x has shape \(7, 3\).*\(5, 8\) along axis"):
        full_spec("x", leaf, Full(pattern="x", rows=(5, 8)))
    with pytest.raises(InputError, match="axis 2"):
        full_spec("x", leaf, Full(pattern="x", rows=(0, 1), axis=2))
    with pytest.raises(InputError, match="x is of type int8 and cannot train"):
        full_spec("x", jax.ShapeDtypeStruct((3,), jnp.int8), Full(pattern="x"))
    boxed = nn.Partitioned(jnp.ones(3), names=(None,))
    with pytest.raises(InputError, match="x is quantized or boxed"):
        full_spec("x", boxed, Full(pattern="x"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_parameters_start_at_the_bases_values_in_float32(dtype):
    params = base(dtype)
    trainable, directions = init(
        jax.random.key(0), spec_with_full_params(), params=params
    )
    assert list(directions) == ["k", "stack"]
    assert list(trainable.full) == [part.path for part in PARTS]
    assert list(trainable.adapters) == ["k", "stack"]
    wanted = {
        "norm/scale": np.asarray(params["norm"]["scale"], np.float32),
        "embed/embedding": np.asarray(params["embed"]["embedding"], np.float32)[4:6],
        "head/kernel": np.asarray(params["head"]["kernel"], np.float32)[:, 5:],
    }
    for path, value in wanted.items():
        assert trainable.full[path].value.dtype == jnp.float32
        np.testing.assert_array_equal(trainable.full[path].value, value)
    alone, _ = init(jax.random.key(0), small_spec("tsd"))
    np.testing.assert_array_equal(trainable.adapters["k"].a, alone.adapters["k"].a)


def test_a_start_shares_no_memory_with_the_base():
    leaf = jnp.ones(5)
    started = start_full(leaf, NORM, jnp.float32)
    jax.jit(lambda x: x + 1, donate_argnums=0)(started.value).block_until_ready()
    np.testing.assert_array_equal(leaf, 1)


def test_a_start_without_a_fitting_base_is_refused():
    with pytest.raises(InputError, match=r"norm/scale trains in full .* give params"):
        init(jax.random.key(0), spec_with_full_params())
    params = base()
    params["norm"] = {"scale": jnp.ones(4)}
    with pytest.raises(InputError, match=r"norm/scale has shape \(4,\).*\(5,\)"):
        init(jax.random.key(0), spec_with_full_params(), params=params)
    with pytest.raises(InputError, match="no 'norm/scale'"):
        init(jax.random.key(0), spec_with_full_params(), params={**params, "norm": {}})


def random_full_params(seed: int) -> dict[str, FullParam]:
    rng = np.random.default_rng(seed)
    return {
        part.path: FullParam(
            jnp.asarray(rng.normal(size=part.value_shape), "float32"), part
        )
        for part in PARTS
    }


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merge_puts_trained_values_in_place(dtype):
    params = base("bfloat16")
    trainable, directions = random_all(1, small_spec("tsd"))
    parts = random_full_params(2)
    merged = merge(params, trainable.replace(full=parts), directions, dtype)
    alone = merge(params, trainable, directions, dtype)
    np.testing.assert_array_equal(merged["k"], alone["k"])
    wanted = {
        path: np.array(params[path.split("/")[0]][path.split("/")[1]], np.float32)
        for path in parts
    }
    rounded = {
        path: np.asarray(part.value.astype(dtype or "bfloat16"), np.float32)
        for path, part in parts.items()
    }
    wanted["norm/scale"] = rounded["norm/scale"]
    wanted["embed/embedding"][4:6] = rounded["embed/embedding"]
    wanted["head/kernel"][:, 5:] = rounded["head/kernel"]
    for path, value in wanted.items():
        module, name = path.split("/")
        assert merged[module][name].dtype == (dtype or "bfloat16")
        np.testing.assert_array_equal(merged[module][name], value)


def test_only_the_rows_receive_a_gradient():
    leaf, part = jnp.ones((7, 3)), random_full_params(0)["embed/embedding"]
    weight = jnp.arange(21.0).reshape(7, 3)
    grad = jax.grad(lambda part: jnp.sum(place_full(leaf, part) * weight))(part)
    np.testing.assert_array_equal(grad.value, np.arange(21.0).reshape(7, 3)[4:6])


def test_launch_passes_full_parameters_on_untouched():
    spec, params = spec_with_full_params("dash"), base()
    trainable, _ = trained(1, small_spec("dash"))
    parts = random_full_params(2)
    launched, directions, report = launch(params, trainable.replace(full=parts), spec)
    assert set(launched.adapters) == {"k", "stack"}
    assert launched.full is parts
    assert set(directions) == set(report) == {"k", "stack"}
