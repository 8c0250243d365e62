from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.helpers import nnx_models as models
from tests.helpers.layouts import FIRST, LAST, NESTED, SECOND
from tsd_jax.binding.nnx import HANDLERS, make_spec
from tsd_jax.binding.nnx.methods import variables
from tsd_jax.binding.nnx.trace import trace_calls
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule


class ScanOfScans(nnx.Module):
    """The inner stack's axis 1 comes after the outer one's axis 0."""

    def __init__(self, rngs):
        self.inner = models.stacked(1, 2)

    def __call__(self, x):
        return models.scanned(x, self.inner, 1)


def layouts_of(model: Any, function: Any, x: Any = None) -> dict[str, Layout]:
    """Trace all kernels of a model, with shapes alone."""
    x = jax.ShapeDtypeStruct((2, 3, models.WIDTH), jnp.float32) if x is None else x
    kernels = tuple(path for path in variables(model) if path.endswith("kernel"))
    traced = trace_calls(model, kernels, HANDLERS, function, (x,), {})
    return {
        p.removesuffix("/kernel"): each.layout for p, each in traced.items() if each
    }


STACKS: dict[str, Any] = {
    "nnx.scan": (0, models.scanned, FIRST),
    "nnx.scan on axis 1": (1, models.scanned, SECOND),
    "nnx.scan on the last axis": (-1, models.scanned, LAST),
    "nnx.vmap": (0, models.in_parallel, FIRST),
    "nnx.vmap on axis 1": (1, models.in_parallel, SECOND),
    "jax.lax.scan over the state": (0, models.by_hand, FIRST),
    "by number": (0, models.by_index, FIRST),
}


@pytest.mark.parametrize(("axis", "apply", "want"), STACKS.values(), ids=STACKS)
def test_layouts_of_stacks(axis, apply, want):
    axes = {} if apply in (models.by_hand, models.by_index) else {"axis": axis}
    layers = nnx.eval_shape(lambda: models.stacked(axis))
    assert layouts_of(layers, lambda layers, x: apply(x, layers, **axes)) == want


def test_layouts_of_a_stack_of_stacks():
    layers = nnx.eval_shape(lambda: models.stacked(0, make=ScanOfScans))
    assert layouts_of(layers, lambda model, x: models.scanned(x, model)) == {
        f"inner/{name}": layout for name, layout in NESTED.items()
    }


def test_a_cube_of_6_6_6_is_what_its_model_does_with_it():
    """No shape tells which of three equal axes is the stack."""

    def make(rngs):
        return nnx.Linear(6, 6, use_bias=False, rngs=rngs)

    for axis, want in ((0, FIRST), (1, SECOND), (2, LAST)):
        layers = nnx.eval_shape(lambda axis=axis: models.stacked(axis, 6, make))
        assert layers.kernel.shape == (6, 6, 6)
        got = layouts_of(layers, lambda layers, x, a=axis: models.scanned(x, layers, a))
        assert got == {"kernel": want["mix"]}


ALONE = {
    "linear": (lambda rngs: nnx.Linear(4, 4, rngs=rngs), Layout((), (0,), (1,))),
    "heads out": (
        lambda rngs: nnx.LinearGeneral(4, (4, 4), rngs=rngs),
        Layout((), (0,), (1, 2)),
    ),
    "heads in": (
        lambda rngs: nnx.LinearGeneral((3, 4), 4, axis=(-2, -1), rngs=rngs),
        Layout((), (0, 1), (2,)),
    ),
    "stacked": (
        lambda rngs: nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs),
        Layout((0,), (1,), (2,)),
    ),
    "einsum": (
        lambda rngs: nnx.Einsum("bti,iho->btho", (4, 4, 4), rngs=rngs),
        Layout((), (0,), (1, 2)),
    ),
    "einsum, stacked": (
        lambda rngs: nnx.Einsum("bhi,iho->bho", (4, 3, 4), rngs=rngs),
        Layout((1,), (0,), (2,)),
    ),
}


@pytest.mark.parametrize(("make", "want"), ALONE.values(), ids=ALONE)
def test_layouts_of_linear_modules_alone(make, want):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    layouts = layouts_of(module, lambda module, x: module(x), x)
    assert layouts == {"kernel": want}


def test_the_layouts_of_a_whole_model():
    model = nnx.eval_shape(lambda: models.Net(axis=1))
    layouts = layouts_of(model, lambda model, x: model(x))
    heads = Layout((), (0,), (1, 2))
    assert layouts == {
        **{f"scanned/{name}": layout for name, layout in SECOND.items()},
        "parallel": Layout((0,), (1,), (2,), (0,)),
        **{f"attention/0/{name}": heads for name in ("query", "key", "value")},
        "attention/0/out": Layout((), (0, 1), (2,)),
        "head": Layout(),
    }


def test_an_abstract_model_will_do():
    model = nnx.eval_shape(lambda: models.Net())
    x = jax.ShapeDtypeStruct((2, 3, models.WIDTH), jnp.float32)
    spec = make_spec(model, [Rule(pattern=".*/mix/kernel", rank=2, directions=2)], x)
    assert [kernel.batch_shape for kernel in spec.kernels] == [(models.LAYERS,)]


class Tied(nnx.Module):
    """Use one parameter in two modules."""

    def __init__(self, second: str):
        rngs = nnx.Rngs(0)
        self.one = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.two = nnx.Einsum(second, (4, 4), rngs=rngs)
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.two(self.one(x))


def test_a_shared_parameter_has_one_path():
    x = jnp.ones((2, 4))
    model = nnx.eval_shape(lambda: Tied("bi,io->bo"))
    layouts = layouts_of(model, lambda model, x: model(x), x)
    assert layouts == {"one": Layout()}


def test_a_parameter_shared_in_two_ways_is_refused():
    model = nnx.eval_shape(lambda: Tied("bo,io->bi"))
    with pytest.raises(InputError, match=r"one/kernel is ambiguous.*leave it out"):
        layouts_of(model, lambda model, x: model(x), jnp.ones((2, 4)))


def test_axes_changed_on_the_way_are_refused():
    layers = nnx.eval_shape(
        lambda: models.stacked(0, 4, lambda rngs: nnx.Linear(6, 6, rngs=rngs))
    )

    def in_groups(layers, x):
        graphdef, state = nnx.split(layers)
        grouped = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), state)
        first = jax.tree.map(lambda leaf: leaf[0], grouped)
        return models.scanned(x, nnx.merge(graphdef, first))

    def narrowed(layers, x):
        graphdef, state = nnx.split(layers)
        half = jax.tree.map(lambda leaf: leaf[0, ..., :3], state)
        return nnx.merge(graphdef, half)(x)

    for function in (in_groups, narrowed):
        with pytest.raises(InputError, match=r"kernel (is cut|has its axes changed)"):
            layouts_of(layers, function)


class Exact(nnx.Module):
    """Do something else where a layer is of a subclass."""

    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.layer(x)
        return y if type(self.layer) is nnx.Linear else -y


def test_a_model_that_asks_for_an_exact_class_is_refused():
    rules = [Rule(pattern=".*kernel", rank=2, directions=2)]
    with pytest.raises(
        InputError, match=r"where a Linear is of a subclass.*isinstance"
    ):
        make_spec(nnx.eval_shape(Exact), rules, jnp.ones((2, 4)))
