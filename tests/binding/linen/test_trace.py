"""Every use of a kernel is accounted for: adapted rightly, or refused by name."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import own_modules
from tests.helpers.layouts import FIRST, LAST, NESTED, PLAIN, SECOND
from tests.helpers.models import LIFTS, Net, inputs, three_ways
from tests.helpers.trees import filled, random_all
from tsd_jax.binding.linen import make_spec
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.binding.linen.trace import trace_calls
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule

RULES = [Rule(pattern="(.*/)?(kernel|w)", rank=2, directions=2)]


@pytest.mark.parametrize("model", own_modules.RIGHT.values(), ids=own_modules.RIGHT)
def test_what_only_contracts_is_adapted_whatever_it_is_called(model):
    x = own_modules.inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = filled(0, shapes, 0.4)
    spec = make_spec(model.apply, {"params": params}, RULES, x, method="tsd")
    got, want, plain = three_ways(model, params, random_all(0, spec, 0.5), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain).max() > 0.1


@pytest.mark.parametrize(
    ("model", "words"), own_modules.REFUSED.values(), ids=own_modules.REFUSED
)
def test_what_does_more_is_refused_by_name(model, words):
    x = own_modules.inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(InputError, match=rf"kernel.*({words}).*leave it out") as caught:
        make_spec(model.apply, variables, RULES, x)
    assert "\n" not in str(caught.value)


def test_a_product_that_leaves_by_two_ways_is_refused():
    model, x = own_modules.Sown(), own_modules.inputs()
    variables = {"params": jax.eval_shape(model.init, jax.random.key(0), x)["params"]}
    assert make_spec(model.apply, variables, RULES, x).paths == ("kernel",)
    with pytest.raises(InputError, match=r"kernel.*the product.*leave it out"):
        make_spec(model.apply, variables, RULES, x, mutable=["intermediates"])


def test_a_gradient_within_the_model_follows_from_its_calls():
    """Forces of an energy: the derivative of a bound model is that of the merged."""

    class Energy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(jnp.tanh(nn.Dense(4)(x))).sum()

    model, x = Energy(), own_modules.inputs()
    params = filled(0, jax.eval_shape(model.init, jax.random.key(0), x)["params"])

    class Forces:
        @staticmethod
        def apply(variables, x):
            return jax.grad(lambda x: model.apply(variables, x))(x)

    spec = make_spec(
        Forces.apply,
        {"params": params},
        [Rule(pattern=".*kernel", rank=1, directions=1)],
        x,
    )
    got, want, plain = three_ways(Forces, params, random_all(0, spec, 0.5), x)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain).max() > 0.01


def test_a_vmapped_apply_is_seen_as_its_modules_see_it():
    model, x = nn.Dense(4), own_modules.inputs()
    params = filled(0, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    apply = jax.vmap(model.apply, (None, 1))
    spec = make_spec(apply, {"params": params}, RULES, x)
    assert spec.kernels[0].layout == Layout()
    assert spec.kernels[0].calls[0].subscripts == "ab,bc->ac"


def layouts_of(model: nn.Module, *args: Any, mutable: Any = False) -> dict[str, Layout]:
    """Trace all kernels of a model, with shapes alone."""
    args = tuple(jnp.asarray(arg) for arg in args)
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    kernels = [p for p in paths.flatten(variables["params"]) if p.endswith("kernel")]
    traced = trace_calls(
        model.apply, variables, tuple(kernels), HANDLERS, args, {"mutable": mutable}
    )
    assert set(traced) == set(kernels)
    return {path: each.layout for path, each in traced.items() if each}


def scanned(module: Any, axis: int, **fields: Any) -> nn.Module:
    """Scan four copies of a linear module over its own output."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return module(name="linear", **fields)(x), None

    scan = nn.scan(
        Step, variable_axes={"params": axis}, split_rngs={"params": True}, length=4
    )

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(name="layers")(x, None)

    return Scanned()


CUBES = {
    "heads out": (nn.DenseGeneral((4, 4)), (2, 4), Layout((), (0,), (1, 2))),
    "heads in": (
        nn.DenseGeneral(4, axis=(-2, -1)),
        (2, 4, 4),
        Layout((), (0, 1), (2,)),
    ),
    "stacked": (
        nn.DenseGeneral(4, batch_dims=(0,)),
        (4, 2, 4),
        Layout((0,), (1,), (2,)),
    ),
    "einsum, middle axis in": (
        nn.Einsum((4, 4, 4), "bi,hio->bho"),
        (2, 4),
        Layout((), (1,), (0, 2)),
    ),
    "einsum, middle axis a stack": (
        nn.Einsum((4, 4, 4), "bhi,iho->bho"),
        (2, 4, 4),
        Layout((1,), (0,), (2,)),
    ),
    "scan on axis 0": (
        scanned(nn.Dense, 0, features=4),
        (2, 4),
        Layout((0,), (1,), (2,), lifted=(0,)),
    ),
    "scan on axis 1": (
        scanned(nn.Dense, 1, features=4),
        (2, 4),
        Layout((1,), (0,), (2,), lifted=(1,)),
    ),
    "scan on the last axis": (
        scanned(nn.Dense, -1, features=4),
        (2, 4),
        Layout((2,), (0,), (1,), lifted=(2,)),
    ),
}


@pytest.mark.parametrize(("model", "shape", "want"), CUBES.values(), ids=CUBES)
def test_a_cube_of_4_4_4_is_what_its_module_does_with_it(model, shape, want):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))
    (kernel,) = (
        leaf
        for path, leaf in paths.flatten(variables["params"]).items()
        if path.endswith("kernel")
    )
    assert kernel.shape == (4, 4, 4)
    (layout,) = layouts_of(model, jnp.ones(shape)).values()
    assert layout == want


WANTED = {
    "plain": PLAIN,
    "remat": PLAIN,
    "scan": FIRST,
    "scan on axis 1": SECOND,
    "scan on the last axis": LAST,
    "scan of remat": FIRST,
    "remat of scan": FIRST,
    "scan of scans": NESTED,
    "vmap": FIRST,
}


@pytest.mark.parametrize("lift", LIFTS)
def test_layouts_under_lifts(lift):
    layouts = layouts_of(Net(lift), inputs(lift))
    inner = "inner/" if lift == "scan of scans" else ""
    want = {f"body/{inner}{k}/kernel": v for k, v in WANTED[lift].items()}
    assert layouts == {**want, "head/kernel": Layout()}


def test_attention_of_flax_with_a_cache():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    x = jnp.ones((1, 1, 6))
    layouts = layouts_of(model, x, mutable=["cache"])
    heads = dict.fromkeys(("query", "key", "value"), PLAIN["heads"])
    want = {**heads, "out": PLAIN["join"]}
    assert layouts == {f"{name}/kernel": layout for name, layout in want.items()}


class Twice(nn.Module):
    """Contract one kernel over its first axis, then over its second."""

    second: str

    @nn.compact
    def __call__(self, x):
        shared = nn.Einsum((4, 4), use_bias=False, name="shared")
        return shared(shared(x, "bi,io->bo"), self.second)


def test_a_kernel_used_twice_alike_is_fine():
    layouts = layouts_of(Twice("bi,io->bo"), jnp.ones((2, 4)))
    assert layouts == {"shared/kernel": Layout()}


def test_an_ambiguous_kernel_is_refused():
    with pytest.raises(InputError, match=r"shared/kernel is ambiguous.*leave it out"):
        layouts_of(Twice("bo,io->bi"), jnp.ones((2, 4)))
