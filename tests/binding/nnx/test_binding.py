from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tsd_jax as tsd
from tests.helpers import nnx_models as models
from tests.helpers.trees import (
    assert_leaves_close,
    method_of,
    random_all,
    trained,
)
from tsd_jax.binding.calls import Call
from tsd_jax.binding.nnx import HANDLERS, bind, einsum, make_spec, merge, params
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule

EVERYTHING = method_of("tsd+keep")
KERNEL = Rule(pattern=".*kernel", rank=2, directions=2)


def scan(layers, x):
    return models.scanned(x, layers)


@pytest.fixture(scope="module")
def net():
    """Return a model, a spec of all its ten kernels, and an input."""
    model, x = models.made(models.Net), models.inputs()
    rule = Rule(pattern=r".*kernel", rank=2, alpha=3, directions=3)
    spec = make_spec(model, [rule], x, method=EVERYTHING)
    assert len(spec.kernels) == 10
    return model, spec, x


def test_factored_is_merged_in_outputs_and_gradients(net):
    """Scanned, recomputed, in parallel; and attention's kernels of several axes."""
    model, spec, x = net
    trainable, directions = random_all(3, spec, scale=0.2)
    graphdef, state = nnx.split(model)

    def differentiate(way, state, trainable):
        def loss(trainable):
            y = way(nnx.merge(graphdef, state), trainable, directions)(x)
            return jnp.sum(y**3), y

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    @jax.jit
    def both(state, trainable):
        return [differentiate(way, state, trainable) for way in (bind, merge)]

    ((_, y), gradients), ((_, want_y), want) = both(state, trainable)
    np.testing.assert_allclose(y, want_y, rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    assert_leaves_close(gradients, want, atol=3e-5)


def test_at_step_0_the_function_is_the_pretrained_one():
    """Bit for bit, under a scan of remat."""

    def make():
        return models.stacked(0, make=lambda rngs: nnx.Linear(6, 6, rngs=rngs))

    layers, x = models.made(make), models.inputs()
    spec = make_spec(layers, [KERNEL], x, function=scan)
    pair = jax.jit(lambda key: init(key, spec))(jax.random.key(0))
    run = nnx.jit(scan)
    np.testing.assert_array_equal(run(bind(layers, *pair), x), run(layers, x))


@pytest.mark.parametrize("method", ["dash", "init"])
def test_launch_keeps_the_function(method):
    """Dash that before it, the others the pretrained one; ready to train on."""

    def make():
        return models.stacked(1, make=lambda rngs: nnx.Linear(6, 6, rngs=rngs))

    def run(layers, x):
        return models.scanned(x, layers, 1)

    layers, x = models.made(make), models.inputs()
    spec = make_spec(layers, [KERNEL], x, method=method, function=run)
    trainable, directions = trained(0, spec)
    kernel = params(layers)["kernel"]
    jitted = nnx.jit(run)
    kept = jitted(bind(layers, trainable, directions), x)
    trainable, directions, rankings = tsd.launch(params(layers), trainable, spec)
    after = jitted(bind(layers, trainable, directions), x)
    if method == "dash":
        np.testing.assert_array_equal(after, kept)
    else:
        assert np.abs(after - kept).max() > 1e-3
        np.testing.assert_allclose(after, jitted(layers, x), rtol=1e-5, atol=1e-5)
    for layer in range(models.LAYERS):  # the stack is axis 1, not the first
        want = np.linalg.svd(np.asarray(kernel[:, layer], np.float64))[1]
        sigma = np.asarray(rankings["kernel"].sigma[layer])
        assert np.abs(sigma[:, None] - want).min(1).max() < 1e-5


def test_bind_changes_no_model_and_copies_no_array(net):
    model, spec, _ = net
    before = jax.tree.leaves(nnx.state(model))
    structure = nnx.graphdef(model)
    pair = random_all(0, spec)
    bound = bind(model, *pair)
    assert nnx.graphdef(model) == structure
    after = jax.tree.leaves(nnx.state(model))
    assert all(a is b for a, b in zip(before, after, strict=True))
    ids = {id(leaf) for leaf in jax.tree.leaves(nnx.state(bound))}
    assert {id(leaf) for leaf in before} <= ids
    assert len(ids) == len(before) + 2 * len(spec.kernels)
    assert bound.head.in_features == models.WIDTH
    assert bound.head.kernel.get_value() is model.head.kernel.get_value()
    assert isinstance(model.head, nnx.Linear)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bound.head.nothing


def test_a_bound_model_can_be_split_and_jitted(net):
    """With other adapters it is the same program."""
    model, spec, x = net
    pairs = [random_all(seed, spec, 0.2) for seed in (0, 10)]
    graphdefs = {nnx.graphdef(bind(model, *pair)) for pair in pairs}
    assert len(graphdefs) == 1
    run = nnx.jit(lambda model, x: model.head(x))
    outputs = [run(bind(model, *pair), x) for pair in pairs]
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


class Weight(nnx.Param):
    """A type of parameter by which somebody tells what is stacked."""


def test_filters_take_factors_as_they_take_the_kernel():
    def make(rngs):
        linear = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        linear.kernel = Weight(linear.kernel.get_value())
        return linear

    def run(layers, x):
        axes = nnx.StateAxes({Weight: 1, ...: None})
        scan = nnx.scan(
            lambda x, layer: layer(x),
            in_axes=(nnx.Carry, axes),
            out_axes=nnx.Carry,
            length=models.LAYERS,
        )
        return scan(x, layers)

    layers, x = models.made(lambda: models.stacked(1, make=make)), models.inputs()
    spec = make_spec(layers, [KERNEL], x, function=run)
    assert spec.kernels[0].batch_shape == (models.LAYERS,)
    pair = random_all(0, spec, 0.2)
    run = nnx.jit(run)
    want = run(merge(layers, *pair), x)
    got = run(bind(layers, *pair), x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


SINGLE: dict[str, Any] = {
    "linear": (
        lambda kinds: nnx.Linear(4, 5, **kinds),
        nn.Dense(5),
        (2, 3, 4),
        jnp.bfloat16,
    ),
    "general": (
        lambda kinds: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), **kinds),
        nn.DenseGeneral((2, 5), axis=(-2, -1)),
        (2, 3, 4),
        jnp.float32,
    ),
    "einsum": (
        lambda kinds: nnx.Einsum("bhi,hio->bho", (3, 4, 5), (3, 5), **kinds),
        nn.Einsum((3, 4, 5), "bhi,hio->bho"),
        (2, 3, 4),
        jnp.float32,
    ),
}


@pytest.mark.parametrize(
    ("make", "linen", "shape", "dtype"), SINGLE.values(), ids=SINGLE
)
def test_a_module_does_what_its_linen_twin_does(make, linen, shape, dtype):
    """Bit for bit: one mask on x, one sum, DoRA's scale on all but the bias, one cast.

    The spec, the adapters and the directions are the same too.
    """
    kinds: Any = {"dtype": dtype, "param_dtype": dtype}
    module = models.made(lambda: make({**kinds, "rngs": nnx.Rngs(0)}))
    linen = linen.clone(**kinds)
    x = models.filled(1, jax.ShapeDtypeStruct(shape, dtype))
    rule = Rule(pattern="kernel", rank=2, alpha=3, directions=2, dropout=0.5, dora=True)
    spec = make_spec(module, [rule], x, method=EVERYTHING)
    variables = {"params": params(module)}
    theirs = tsd.make_spec(linen.apply, variables, [rule], x, method=EVERYTHING)
    bare = [dataclasses.replace(s.kernels[0], calls=()) for s in (spec, theirs)]
    assert bare[0] == bare[1]
    trainable, directions = random_all(0, spec)
    key = jax.random.key(3)
    y = bind(module, trainable, directions, key)(x)
    with pytest.raises(InputError, match=r"kernel: its adapter was made for flax\.nnx"):
        tsd.adapted(linen.apply)(
            {"params": tsd.bind(params(module), trainable, directions)}, x
        )
    bound = tsd.bind(params(module), random_all(0, theirs)[0], directions, key)
    want = tsd.adapted(linen.apply)({"params": bound}, x)
    assert y.dtype == want.dtype == dtype
    np.testing.assert_array_equal(y, want)
    assert np.abs(np.asarray(y - module(x), np.float32)).max() > 0.1


def test_the_low_rank_path_against_float64():
    module = models.made(lambda: nnx.Linear(4, 5, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    rules = [Rule(pattern="kernel", rank=2, alpha=6, directions=2)]
    spec = make_spec(module, rules, x, method="tsd")
    trainable, directions = random_all(0, spec)
    a, b, g = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(trainable))
    left, right, o = (np.asarray(x, np.float64) for x in jax.tree.leaves(directions))
    want = x @ np.asarray(module.kernel, np.float64) + np.asarray(module.bias)
    want += 3 * (x @ a) @ b + ((x @ left) * (g + o)) @ right.T
    y = bind(module, trainable, directions)(x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_the_dense_change_is_never_formed():
    """No array of a gradient program has a kernel's size, but the kernel itself."""
    module = models.made(lambda: nnx.Linear(200, 300, rngs=nnx.Rngs(0)))
    x = jnp.ones((4, 200))
    spec = make_spec(module, [KERNEL], x, method="tsd")
    trainable, directions = random_all(0, spec)

    def loss(trainable):
        return jnp.sum(bind(module, trainable, directions)(x) ** 2)

    program: Any = jax.make_jaxpr(jax.grad(loss))(trainable)
    sizes = [v.aval.size for e in program.jaxpr.eqns for v in e.outvars]
    assert max(sizes) < 200 * 300


class Counting(nnx.Module):
    """Keep batch statistics and a random stream beside a linear module."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


def test_what_a_call_changes_is_found_in_the_copy():
    model, x = Counting(), models.filled(0, jax.ShapeDtypeStruct((8, 4), jnp.float32))
    rules = [Rule(pattern="linear/kernel", rank=2, directions=2)]
    spec = make_spec(model, rules, x)
    trainable, directions = init(jax.random.key(0), spec)
    other = nnx.Not(nnx.Param)
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))

    def loss(trainable):
        bound = bind(model, trainable, directions)
        return jnp.sum(bound(x) ** 2), nnx.state(bound, other)

    (_, changed), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    for a, b in zip(
        jax.tree.leaves(nnx.state(model, nnx.BatchStat)), before, strict=True
    ):
        np.testing.assert_array_equal(a, b)
    nnx.update(model, changed)
    assert np.abs(model.norm.mean.get_value()).max() > 0
    assert model.drop.rngs is not None
    assert int(model.drop.rngs.count.get_value()) == 1


class Own(nnx.Module):
    """Contract parameters of its own: heads, weights for each head, and back."""

    def __init__(self, rngs):
        normal = nnx.initializers.normal(0.5)
        self.up = nnx.Param(normal(rngs.params(), (6, 2, 3)))
        self.down = nnx.Param(normal(rngs.params(), (2, 3, 6)))

    def __call__(self, x):
        h = jax.nn.gelu(einsum(self, "btd,dhk->bthk", x, "up"))
        return x + einsum(self, "bthk,hkd->btd", h, "down", dtype=x.dtype)


def test_einsums_of_ones_own_under_a_scan():
    layers = models.made(lambda: models.stacked(0, make=Own))
    x = models.inputs()
    rules = [Rule(pattern="up|down", rank=2, directions=2)]
    spec = make_spec(layers, rules, x, method=EVERYTHING, function=scan)
    shapes = {k.path: (k.batch_shape, k.fan_in, k.fan_out) for k in spec.kernels}
    assert shapes == {"down": ((3,), 6, 6), "up": ((3,), 6, 6)}
    pair = random_all(0, spec, 0.2)
    run = nnx.jit(scan)
    got, plain = run(bind(layers, *pair), x), run(layers, x)
    np.testing.assert_allclose(got, run(merge(layers, *pair), x), rtol=2e-5, atol=2e-5)
    assert np.abs(got - plain).max() > 0.1


class Transposed(nnx.Module):
    """A linear module of somebody's own, which stores its kernel transposed."""

    def __init__(self, extra: Any = lambda y: y):
        self.weight = nnx.Param(jax.random.normal(jax.random.key(0), (5, 4)))
        self.extra = extra

    def __call__(self, x):
        return self.extra(x @ self.weight.get_value().T)


def transposed(module: Transposed, x: jax.Array) -> Call:
    del module
    return Call("weight", x, "...i,oi->...o")


def test_a_handler_of_your_own():
    handlers = {**HANDLERS, Transposed: transposed}
    model, x = Transposed(), jax.random.normal(jax.random.key(1), (2, 4))
    rules = [Rule(pattern="weight", rank=2, directions=2)]
    assert make_spec(model, rules, x).kernels[0].layout == Layout((), (1,), (0,))
    spec = make_spec(model, rules, x, handlers=handlers)
    pair = random_all(0, spec)
    got = bind(model, *pair, handlers=handlers)(x)
    np.testing.assert_allclose(got, merge(model, *pair)(x), rtol=1e-5, atol=1e-5)
    assert np.abs(got - model(x)).max() > 0.1


def test_a_handler_of_a_module_that_does_more_is_refused():
    handlers = {**HANDLERS, Transposed: transposed}
    rules = [Rule(pattern="weight", rank=2, directions=2)]
    for extra, words in (
        (jnp.sum, "the product goes through"),
        (lambda y: (y, y), "twice"),
    ):
        with pytest.raises(InputError, match=rf"weight is contracted, .*{words}"):
            make_spec(Transposed(extra), rules, jnp.ones((2, 4)), handlers=handlers)


class Half(nnx.Module):
    """Own a linear module that its call does not use."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.used, self.unused = (
            nnx.Linear(4, 4, rngs=rngs),
            nnx.Linear(4, 4, rngs=rngs),
        )

    def __call__(self, x):
        return self.used(x)

    def both(self, x):
        return self.used(x) + self.unused(x)


def linear(**settings: Any) -> Any:
    return lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0), **settings)


REFUSED: dict[str, Any] = {
    "convolution": (
        lambda: nnx.Conv(4, 5, (3,), rngs=nnx.Rngs(0)),
        "kernel",
        r"kernel is convolved in Conv.*leave it out",
    ),
    "embedding": (
        lambda: nnx.Embed(5, 4, rngs=nnx.Rngs(0)),
        "embedding",
        r"embedding is read by index in Embed.*leave it out",
    ),
    "bias": (linear(), "bias", r"bias is added, not contracted, in Linear"),
    "unused": (Half, ".*/kernel", r"unused/kernel is matched.*no module uses"),
    "nothing": (linear(), "kernels", r"matches no parameter.*nearest.*kernel"),
    "rank": (linear(), "kernel", r"rank 5 is larger.*\(in 4, out 4\)"),
}


@pytest.mark.parametrize(("make", "pattern", "line"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line_that_names_the_kernel(make, pattern, line):
    model = nnx.eval_shape(make)
    rank = 5 if "rank" in line else 2
    dtype = jnp.int32 if pattern == "embedding" else jnp.float32
    rules = [Rule(pattern=pattern, rank=rank, directions=1)]
    with pytest.raises(InputError, match=line) as caught:
        make_spec(model, rules, jax.ShapeDtypeStruct((2, 7, 4), dtype))
    assert "\n" not in str(caught.value)


def test_another_function_of_the_model_can_be_traced():
    model = nnx.eval_shape(Half)
    spec = make_spec(model, [KERNEL], jnp.ones((2, 4)), function=Half.both)
    assert spec.paths == ("unused/kernel", "used/kernel")


def test_a_tree_of_another_model_is_refused():
    model = models.made(linear())
    spec = make_spec(model, [KERNEL], jnp.ones((2, 4)))
    pair = random_all(0, spec)
    for way in (bind, merge):
        with pytest.raises(InputError, match=r"no .kernel.:"):
            way(nnx.eval_shape(models.Net), *pair)


def test_modules_in_a_tuple_are_adapted():
    class Pair(nnx.Module):
        def __init__(self):
            self.two = nnx.data((linear()(), linear()()))

        def __call__(self, x):
            return self.two[1](self.two[0](x))

    model, x = models.made(Pair), jnp.ones((2, 4))
    spec = make_spec(model, [KERNEL], x, method=EVERYTHING)
    assert len(spec.kernels) == 2
    pair = random_all(0, spec, 0.3)
    want = merge(model, *pair)(x)
    np.testing.assert_allclose(bind(model, *pair)(x), want, rtol=1e-5, atol=1e-5)


class Wider(nnx.Linear):
    """Call the class it derives from, and nothing else."""

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs)


class ScaledLinear(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        return 2 * super().__call__(inputs)


class Asking(nnx.Module):
    """Do something else where a layer is no linear one."""

    def __init__(self):
        self.layer = Wider(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.layer(x)
        return jnp.tanh(y) if isinstance(self.layer, nnx.Linear) else -y


def test_a_bound_module_is_what_its_class_says():
    model, x = models.made(Asking), jnp.ones((2, 4))
    spec = make_spec(model, [KERNEL], x, method=EVERYTHING)
    start = init(jax.random.key(0), spec)
    np.testing.assert_array_equal(bind(model, *start)(x), model(x))
    pair = random_all(0, spec, 0.3)
    bound = bind(model, *pair)
    want = merge(model, *pair)(x)
    np.testing.assert_allclose(bound(x), want, rtol=1e-5, atol=1e-5)
    assert isinstance(bound.layer, Wider)
    assert set(params(bound)["layer"]) == {"kernel", "bias", "kernel_tsd"}
    assert type(model.layer) is Wider


class TiedRaw(nnx.Module):
    """Decode with the encoder's kernel, read raw."""

    def __init__(self):
        self.e = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.tanh(self.e(x)) @ self.e.kernel.get_value().T


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScaledLinear(4, 4, rngs=nnx.Rngs(0)), "the product is multiplied"),
        (TiedRaw, "contracted"),
    ],
)
def test_what_does_more_is_refused_by_name(make, words):
    with pytest.raises(InputError, match=f"kernel.*{words}.*leave it out"):
        make_spec(models.made(make), [KERNEL], jnp.ones((2, 4)))


def test_a_shared_module_is_adapted_wherever_it_is():
    class Shared(nnx.Module):
        def __init__(self):
            self.one = linear(use_bias=False)()
            self.two = self.one
            self.three = linear(use_bias=False)()
            self.three.kernel = self.one.kernel

        def __call__(self, x):
            return self.three(self.two(self.one(x)))

    model, x = models.made(Shared), jnp.ones((2, 4))
    spec = make_spec(model, [KERNEL], x, method=EVERYTHING)
    assert spec.paths == ("one/kernel",)
    pair = random_all(0, spec, 0.3)
    want = merge(model, *pair)(x)
    np.testing.assert_allclose(bind(model, *pair)(x), want, rtol=1e-5, atol=1e-5)


def test_parameters_are_a_tree_of_strings(net):
    model, spec, _ = net
    flat = paths.flatten(params(model))
    assert set(spec.paths) <= set(flat)
    assert "attention/0/query/kernel" in flat
    assert flat["head/bias"] is model.head.bias.get_value()


def test_full_parameters_train_beside_adapters():
    model, x = models.made(linear()), jnp.ones((2, 4))
    rules = [KERNEL, tsd.Full(pattern="bias")]
    spec = make_spec(model, rules, x)
    trainable, directions = init(jax.random.key(0), spec, params=params(model))
    plain = model(x)
    np.testing.assert_array_equal(bind(model, trainable, directions)(x), plain)
    bias = trainable.full["bias"]
    trainable = trainable.replace(full={"bias": bias.replace(value=bias.value + 1)})
    for way in (bind, merge):
        y = way(model, trainable, directions)(x)
        np.testing.assert_allclose(y, plain + 1, rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match=r"bias has shape \(4,\).*axis 0"):
        make_spec(model, [KERNEL, tsd.Full(pattern="bias", rows=(2, 6))], x)


def test_merging_can_widen():
    model = models.made(linear(param_dtype=jnp.bfloat16))
    spec = make_spec(model, [KERNEL], jnp.ones((2, 4)))
    pair = random_all(0, spec)
    merged = merge(model, *pair, dtype=jnp.float32)
    assert merged.kernel.get_value().dtype == jnp.float32
    assert merge(model, *pair).kernel.get_value().dtype == jnp.bfloat16
    assert model.kernel.get_value().dtype == jnp.bfloat16
