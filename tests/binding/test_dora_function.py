"""The function of a model with DoRA, against kernels that are formed and scaled."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import Net, inputs, net, three_ways
from tests.helpers.trees import random_all, trained
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core import paths
from tsd_jax.core.adapter import Trainable, low_rank_factors
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch

LIFT = "scan of remat"


def doubled(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def materialised(params, trainable, directions):
    """Form m o (K + dK) / ||K + dK||, the norm a constant, and put it in K's place."""
    kernels = {}
    for path, adapter in trainable.adapters.items():
        layout = adapter.kernel.layout
        down, up = low_rank_factors(adapter, directions[path])
        kernel = paths.flatten(params)[path]
        total = layout.to_matrices(kernel) + jnp.matmul(down, up)
        norms = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(total**2, -2)))
        scaled = (adapter.magnitude / norms)[..., None, :] * total
        kernels[path] = layout.from_matrices(scaled, kernel.shape)
    return paths.update(params, kernels)


def test_outputs_and_gradients_are_those_of_the_kernel_formed():
    """In float64, where nothing is lost: heads, einsums, biases, every factor."""
    with jax.enable_x64(True):
        model, params, spec = net(LIFT, "tsd", dora=True)
        model = Net(LIFT, jnp.float64)
        x, params = doubled(inputs(LIFT)), doubled(params)
        trainable, directions = doubled(random_all(1, spec, 0.5))

        def outputs(trainable):
            bound = bind(params, trainable, directions)
            return adapted(model.apply)({"params": bound}, x)

        def expected(trainable):
            whole = materialised(params, trainable, directions)
            return model.apply({"params": whole}, x)

        @jax.jit
        def both(trainable):
            def size(y):
                return jnp.sum(y**2), y

            pairs = (
                jax.value_and_grad(lambda a, f=f: size(f(a)), has_aux=True)(trainable)
                for f in (outputs, expected)
            )
            return tuple(pairs)

        ((_, ours), our_grads), ((_, theirs), their_grads) = both(trainable)
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11 * scale)
        assert np.abs(theirs - model.apply({"params": params}, x)).max() > 0.1
        assert np.abs(our_grads.adapters["body/mix/kernel"].magnitude).max() > 1e-3
        for got, want in zip(
            jax.tree.leaves(our_grads), jax.tree.leaves(their_grads), strict=True
        ):
            bound = 1e-9 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=1e-7, atol=bound)


def test_rows_lie_where_the_scan_slices():
    """Stacked on the last axis, heads and biases beside."""
    lift = "scan on the last axis"
    model, params, spec = net(lift, "dash", pattern="body/(heads|mix)/.*l", dora=True)
    pairs, x = random_all(1, spec, 0.5), inputs(lift)
    ours, theirs, before = three_ways(model, params, pairs, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - before).max() > 0.1


def test_bfloat16_models_are_scaled_in_float32():
    model, params, spec = net(
        LIFT, "tsd", pattern="body/mix/kernel", dtype=jnp.bfloat16, dora=True
    )
    pairs = random_all(1, spec, 0.5)
    x = inputs(LIFT, jnp.bfloat16)
    y = jax.jit(adapted(model.apply))({"params": bind(params, *pairs)}, x)
    assert y.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    whole = materialised(wide, *pairs)
    exact = jax.jit(Net(LIFT).apply)({"params": whole}, x.astype(jnp.float32))
    error = np.asarray(y, np.float32) - np.asarray(exact)
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


def test_at_step_0_and_over_the_launch_of_dash_nothing_changes():
    """The first to rounding, for m is ||K||; the second bit for bit."""
    model, params, spec = net(LIFT, "dash", pattern="body/mix/kernel", dora=True)
    x = inputs(LIFT)
    apply = jax.jit(adapted(model.apply))
    run = jax.jit(lambda *pair: apply({"params": bind(params, *pair)}, x))
    start = init(jax.random.key(0), spec, params=params)
    before = np.asarray(model.apply({"params": params}, x))
    np.testing.assert_allclose(run(*start), before, rtol=1e-6, atol=1e-6)
    trainable, directions = trained(0, spec, 0.3)
    moved = trainable.adapters["body/mix/kernel"].replace(
        magnitude=jnp.full((3, 6), 1.3)
    )
    trainable = Trainable(adapters={"body/mix/kernel": moved})
    new, frozen, _ = launch(params, trainable, spec)
    assert np.abs(frozen["body/mix/kernel"].left).max() > 0.1
    np.testing.assert_array_equal(run(new, frozen), run(trainable, directions))


def dense(dropout=0.0, **settings):
    """Return a dense layer, its adapter and an input."""
    model = nn.Dense(5, **settings)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    rule = Rule(pattern="kernel", rank=2, directions=2, dropout=dropout, dora=True)
    spec = make_spec(model.apply, {"params": params}, [rule], x, method="dash")
    return model, params, x, random_all(0, spec)


def test_dropout_is_of_the_low_rank_path_alone():
    """One mask on x there; x K and the norm are whole."""
    model, params, x, (trainable, directions) = dense(dropout=0.5)
    key = jax.random.key(1)
    y = adapted(model.apply)({"params": bind(params, trainable, directions, key)}, x)
    down, up = low_rank_factors(trainable.adapters["kernel"], directions["kernel"])
    x, down, up = (np.asarray(each, np.float64) for each in (x, down, up))
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    scale = trainable.adapters["kernel"].magnitude / np.linalg.norm(
        kernel + down @ up, axis=0
    )
    more = (np.asarray(y) - bias) / np.asarray(scale) - x @ kernel
    # Of every row of x some entries are doubled and the others are gone.
    masks = np.indices((2,) * 6).reshape(6, -1).T
    for row, seen in zip(x, more, strict=True):
        tried = (2 * masks * row) @ down @ up
        assert np.abs(tried - seen).max(1).min() < 1e-4
    assert np.abs(more - x @ down @ up).max() > 0.1


def test_a_column_of_zeros_gives_numbers():
    model, params, x, (trainable, directions) = dense(use_bias=False)
    adapter = trainable.adapters["kernel"].replace(
        b=trainable.adapters["kernel"].b.at[:, 2].set(0), gain=jnp.zeros(2)
    )
    params = {"kernel": params["kernel"].at[:, 2].set(0)}

    def run(adapter):
        bound = bind(params, Trainable(adapters={"kernel": adapter}), directions)
        return adapted(model.apply)({"params": bound}, x)

    none = jax.tree.map(jnp.zeros_like, directions["kernel"])
    directions = {"kernel": none}
    np.testing.assert_array_equal(run(adapter)[:, 2], 0)
    grads = jax.grad(lambda a: jnp.sum(run(a) ** 2))(adapter)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


class Shifted(nn.Module):
    """A linear module of somebody's own, whose bias has another name."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (x.shape[-1], 5))
        return x @ kernel + self.param("shift", nn.initializers.normal(), (1, 5))


def test_the_trace_names_the_bias():
    """What is added to x K is not scaled, whatever its parameter is called."""
    model, x = Shifted(), jnp.ones((4, 6))
    params = model.init(jax.random.key(0), x)["params"]
    rule = Rule(pattern="kernel", rank=2, directions=2, dora=True)
    spec = make_spec(model.apply, {"params": params}, [rule], x, method="dash")
    assert spec.kernels[0].calls[0].bias == "shift"
    pairs = random_all(0, spec)
    bound = {"params": bind(params, *pairs)}
    want = x @ materialised(params, *pairs)["kernel"] + params["shift"]
    got = adapted(model.apply)(bound, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_columns_are_over_all_the_inputs():
    """Heads as stacked outputs are columns still; as stacked inputs they are none."""
    x = jnp.ones((3, 6))
    wide, narrow = nn.DenseGeneral((2, 4)), nn.DenseGeneral(5, axis=(-2, -1))
    apart = Layout((1,), (0,), (2,))
    rule = Rule(pattern="kernel", rank=2, directions=2, layout=apart, dora=True)
    params = wide.init(jax.random.key(0), x)["params"]
    spec = make_spec(wide.apply, {"params": params}, [rule], x, method="dash")
    trainable, directions = random_all(0, spec)
    assert trainable.adapters["kernel"].magnitude.shape == (2, 4)
    got = adapted(wide.apply)({"params": bind(params, trainable, directions)}, x)
    whole = materialised(params, trainable, directions)
    want = np.asarray(wide.apply({"params": whole}, x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    heads = jnp.ones((3, 2, 4))
    params = narrow.init(jax.random.key(0), heads)["params"]
    rule = Rule(pattern="kernel", rank=2, layout=Layout((0,), (1,), (2,)), dora=True)
    with pytest.raises(InputError, match="DoRA scales columns over all of the inputs"):
        make_spec(narrow.apply, {"params": params}, [rule], heads, method="lora")
