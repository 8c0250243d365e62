"""Adapters under JAX's stricter modes, and in trees of unusual shapes."""

from __future__ import annotations

from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tsd_jax as tsd
from tests.helpers.models import inputs, net, three_ways
from tests.helpers.trees import filled, random_all, trained

RULE = tsd.Rule(pattern="(.*/)?kernel", rank=2, directions=2)


@pytest.mark.parametrize("dora", [False, True])
def test_strict_promotion_of_types(dora):
    model, params, spec = net(
        "scan", "tsd", dtype=jnp.bfloat16, dora=dora, pattern="body/.*kernel"
    )
    x, pair = inputs("scan", jnp.bfloat16), trained(0, spec, 0.3)

    def all_of_it():
        before = three_ways(model, params, pair, x)
        launched = tsd.launch(params, pair[0], spec)
        return before, three_ways(model, params, launched[:2], x)

    want = all_of_it()
    with jax.numpy_dtype_promotion("strict"):
        got = all_of_it()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_dropout_keys_of_any_kind(kind):
    model, x = nn.Dense(4), jnp.ones((3, 4))
    params = model.init(jax.random.key(0), x)["params"]
    rule = tsd.Rule(pattern="kernel", rank=2, directions=2, dropout=0.5)
    spec = tsd.make_spec(model.apply, {"params": params}, [rule], x)
    pair = random_all(0, spec)
    apply = jax.jit(tsd.adapted(model.apply))
    runs = [
        apply({"params": tsd.bind(params, *pair, key)}, x)
        for key in (jax.random.key(5, impl=kind), jax.random.key(6, impl=kind), None)
    ]
    assert all(np.isfinite(run).all() for run in runs)
    assert np.abs(runs[0] - runs[2]).max() > 1e-3


def test_no_tracer_leaks():
    class Two(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.two = nnx.Linear(4, 4, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.two(jnp.tanh(self.one(x)))

    model, x = Two(), jnp.ones((2, 4))
    with jax.checking_leaks():
        spec = tsd.nnx.make_spec(model, [RULE], x)
        pair = random_all(0, spec)
        tsd.nnx.check(model, spec, x)
        graphdef, state = nnx.split(model)

        @jax.jit
        def run(state, pair):
            return tsd.nnx.bind(nnx.merge(graphdef, state), *pair)(x)

        run(state, pair)
    linen = nn.Dense(4)
    params = linen.init(jax.random.key(0), x)["params"]
    with jax.checking_leaks():
        spec = tsd.make_spec(linen.apply, {"params": params}, [RULE], x)
        tsd.check(linen.apply, {"params": params}, spec, x)


class Slashed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.Dense(4, name="a/b")(x))


@pytest.mark.parametrize("freeze", [dict, flax.core.freeze])
def test_names_with_slashes_empty_branches_and_frozen_trees(freeze):
    model, x = Slashed(), jnp.ones((2, 4))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    tree: Any = freeze({**filled(0, shapes, 0.4), "empty": {}})
    spec = tsd.make_spec(model.apply, {"params": tree}, [RULE], x)
    assert spec.paths == ("a/b/kernel", "b/kernel")
    pair = random_all(0, spec)
    got, want, plain = three_ways(model, tree, pair, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain).max() > 0.1
    merged = tsd.merge(tree, *pair)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert "empty" in merged
    assert "empty" in tsd.bind(tree, *pair)


def test_a_feed_forward_that_shares_a_scope_with_dora():
    """Gemma's: two modules' parameters lie in one scope."""

    class Gate(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(0.5), (4, 4))

    class Forward(nn.Module):
        def setup(self):
            self.gate = Gate()
            nn.share_scope(self, self.gate)
            self.out = self.param("out", nn.initializers.normal(0.5), (4, 4))

        def __call__(self, x):
            return jnp.tanh(self.gate(x))

    model, x = Forward(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    assert set(params) == {"kernel", "out"}
    rule = tsd.Rule(pattern="kernel", rank=2, directions=2, dora=True)
    spec = tsd.make_spec(model.apply, {"params": params}, [rule], x)
    got, want, plain = three_ways(model, params, random_all(0, spec), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain).max() > 0.01


def test_dora_where_more_than_a_bias_is_added_is_refused():
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + x @ self.param("kernel", nn.initializers.normal(0.5), (4, 4))

    model, x = Residual(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    spec = tsd.make_spec(model.apply, {"params": params}, [RULE], x)
    got, want, _ = three_ways(model, params, random_all(0, spec), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    rule = tsd.Rule(pattern="kernel", rank=2, directions=2, dora=True)
    with pytest.raises(tsd.InputError, match="kernel: DoRA scales x K and not what is"):
        tsd.make_spec(model.apply, {"params": params}, [rule], x)
