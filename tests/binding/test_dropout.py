"""Dropout on the low-rank path, read off models whose output is the mask itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import inputs, net
from tests.helpers.trees import method_of, random_all
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Directions
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule

WIDTH, LAYERS, RATE = 32, 3, 0.25


class Layer(nn.Module):
    """Pass x on, and give what the linear module makes of it."""

    @nn.compact
    def __call__(self, x, _=None):
        return x, nn.Dense(WIDTH, use_bias=False, name="linear")(x)


class Layers(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scan = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return scan(name="layers")(x, None)[1]


def masks(key, method="lora", remat=False):
    """Return (layers, 16, 32): y = drop(x) where A = B = 1, L = 1, R = offset = 1."""
    model, x = Layers(remat), jnp.ones((16, WIDTH))
    params = {"layers": {"linear": {"kernel": jnp.zeros((LAYERS, WIDTH, WIDTH))}}}
    rule = Rule(pattern=".*kernel", rank=WIDTH, alpha=WIDTH, dropout=RATE)
    spec = make_spec(model.apply, {"params": params}, [rule], x, method=method)
    trainable, directions = random_all(0, spec)
    ones = jnp.broadcast_to(jnp.eye(WIDTH), (LAYERS, WIDTH, WIDTH))
    (path,) = spec.paths
    trainable.adapters[path] = trainable.adapters[path].replace(a=ones, b=ones)
    if method == "init":  # what Init starts with: the offset takes A B out again
        away = -jnp.ones((LAYERS, WIDTH))
        directions[path] = Directions(left=ones, right=ones, offset=away)
    bound = bind(params, trainable, directions, key)
    return np.asarray(jax.jit(adapted(model.apply))({"params": bound}, x))


def test_without_a_key_there_is_none():
    np.testing.assert_array_equal(masks(None), 1)


@pytest.mark.parametrize("remat", [False, True])
def test_masks_keep_the_mean_and_differ_by_layer(remat):
    got = masks(jax.random.key(0), remat=remat)
    assert set(np.unique(got).tolist()) == {0.0, np.float32(1 / (1 - RATE))}
    assert np.abs(got.mean(axis=(1, 2)) - 1).max() < 0.1
    for layer in range(1, LAYERS):
        agree = (got[layer] == got[0]).mean()
        assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 0.1
    # Every position and feature of a layer has a draw of its own.
    assert len(np.unique(got[0], axis=0)) == 16
    assert len(np.unique(got[0], axis=1).T) > WIDTH / 2


def test_masks_are_a_function_of_the_key():
    again = masks(jax.random.key(0))
    np.testing.assert_array_equal(masks(jax.random.key(0)), again)
    assert (masks(jax.random.key(1)) != again).mean() > 0.2


def test_one_mask_serves_both_factors():
    """So that Init's start, gamma A B - L sigma R^T = 0, holds under dropout too."""
    np.testing.assert_array_equal(masks(jax.random.key(0), method="init"), 0)


def test_two_kernels_of_one_shape_draw_apart():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return [nn.Dense(4, use_bias=False, name=name)(x) for name in "ab"]

    model, x = Pair(), jnp.ones((64, 4))
    params = {name: {"kernel": jnp.zeros((4, 4))} for name in "ab"}
    rules = [Rule(pattern=".*", rank=4, alpha=4, dropout=0.5)]
    spec = make_spec(model.apply, {"params": params}, rules, x, method="lora")
    trainable, directions = random_all(0, spec)
    for path in spec.paths:
        trainable.adapters[path] = trainable.adapters[path].replace(
            a=jnp.eye(4), b=jnp.eye(4)
        )
    bound = bind(params, trainable, directions, jax.random.key(0))
    first, second = adapted(model.apply)({"params": bound}, x)
    assert 0.35 < (np.asarray(first) == np.asarray(second)).mean() < 0.65


@pytest.mark.parametrize(
    ("lift", "pattern", "dtype"),
    [
        ("plain", ".*kernel", jnp.bfloat16),
        ("scan of scans", ".*/each/kernel", jnp.float32),
    ],
)
def test_every_kind_of_module_can_drop(lift, pattern, dtype):
    """Stacks a module sees itself (Einsum's heads) among them."""
    settings = {"pattern": pattern, "dtype": dtype, "dropout": RATE}
    model, params, spec = net(lift, method_of("tsd+keep"), **settings)
    x, pairs = inputs(lift, dtype), random_all(0, spec, 0.3)
    apply = jax.jit(adapted(model.apply))

    def run(key):
        y = apply({"params": bind(params, *pairs, key)}, x)
        assert y.dtype == dtype
        return np.asarray(y, np.float32)

    dropped = run(jax.random.key(0))
    np.testing.assert_array_equal(run(jax.random.key(0)), dropped)
    assert np.abs(run(None) - dropped).max() > 1e-3
    assert np.abs(run(jax.random.key(1)) - dropped).max() > 1e-3


@pytest.mark.parametrize("stacked", [2, 3])
def test_a_kernel_split_by_a_rule_can_drop(stacked):
    """(layers, 6, 2, 4), a matrix for each head or for each place in the head."""
    layout = Layout((0, stacked), (1,), (5 - stacked,))
    model, params, _ = net("scan", "lora")
    path = "body/heads/kernel"
    rules = [Rule(pattern=path, rank=2, layout=layout, dropout=RATE)]
    x = inputs("scan")
    spec = make_spec(model.apply, {"params": params}, rules, x, method="lora")
    pairs = random_all(0, spec)
    apply = jax.jit(adapted(model.apply))
    dropped = apply({"params": bind(params, *pairs, jax.random.key(0))}, x)
    whole = apply({"params": bind(params, *pairs)}, x)
    assert np.isfinite(dropped).all()
    assert np.abs(np.asarray(dropped - whole)).max() > 1e-3


def test_remat_draws_the_same_mask_again():
    """Else the gradient would be of another function than the forward pass."""

    def gradients(lift):
        settings = {"pattern": "body/mix/kernel", "dropout": RATE}
        model, params, spec = net(lift, method_of("tsd+keep"), **settings)
        trainable, directions = random_all(0, spec, 0.3)

        @jax.jit
        @jax.grad
        def gradient(trainable):
            bound = bind(params, trainable, directions, jax.random.key(0))
            return jnp.sum(adapted(model.apply)({"params": bound}, inputs(lift)) ** 2)

        return jax.tree.leaves(gradient(trainable))

    pairs = zip(gradients("scan"), gradients("scan of remat"), strict=True)
    for plain, recomputed in pairs:
        np.testing.assert_allclose(plain, recomputed, rtol=1e-4, atol=1e-3)
