"""Linen modules of one's own that contract raw parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import three_ways
from tests.helpers.trees import filled, method_of, random_all
from tsd_jax.binding.calls import Call
from tsd_jax.binding.linen import adapted, bind, einsum, make_spec
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule

KINDS = {"up": (6, 2, 3), "down": (2, 3, 6)}


class Own(nn.Module):
    """Two raw parameters and a nonlinearity between, declared inline or in setup."""

    dtype: Any = None

    def setup(self):
        normal = nn.initializers.normal(0.5)
        self.up = self.param("up", normal, KINDS["up"])
        self.down = self.param("down", normal, KINDS["down"])

    def __call__(self, x, _=None):
        h = einsum(self, "btd,dhk->bthk", x, "up", dtype=self.dtype)
        y = einsum(self, "bthk,hkd->btd", jax.nn.gelu(h), "down", dtype=self.dtype)
        return x + y.astype(x.dtype), None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Own, prevent_cse=False),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


def inputs() -> jax.Array:
    return filled(7, jax.ShapeDtypeStruct((2, 3, 6), jnp.float32))


RULES = [Rule(pattern=".*up|.*down", rank=2, directions=2)]


def test_several_einsums_of_one_module_under_a_scan():
    model, x = Layers(), inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = filled(0, shapes, 0.4)
    spec = make_spec(
        model.apply, {"params": params}, RULES, x, method=method_of("tsd+keep")
    )
    assert {kernel.path: kernel.layout for kernel in spec.kernels} == {
        "layers/down": Layout((1,), (0, 2), (3,), (1,)),
        "layers/up": Layout((1,), (0,), (2, 3), (1,)),
    }
    pairs = random_all(0, spec, 0.2)
    got, want, plain = three_ways(model, params, pairs, x)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert np.abs(got - plain).max() > 0.1


def test_unadapted_it_is_jnp_einsum():
    model, x = Own(), inputs()
    params: Any = filled(0, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    h = jax.nn.gelu(jnp.einsum("btd,dhk->bthk", x, params["up"]))
    want = x + jnp.einsum("bthk,hkd->btd", h, params["down"])
    np.testing.assert_array_equal(model.apply({"params": params}, x)[0], want)


def test_it_casts_and_rounds_once():
    """Operands in bfloat16, the low-rank path in float32 from x as it came."""
    model, x = Own(jnp.bfloat16), inputs()
    params: Any = filled(0, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    rules = [Rule(pattern="up", rank=2, directions=2)]
    spec = make_spec(model.apply, {"params": params}, rules, x)
    trainable, directions = random_all(0, spec)
    bound = bind(params, trainable, directions)
    y = adapted(model.apply)({"params": bound}, x)[0]
    assert y.dtype == jnp.float32
    narrow = [leaf.astype(jnp.bfloat16) for leaf in (x, params["up"])]
    base = np.asarray(jnp.einsum("btd,dhk->bthk", *narrow), np.float64)
    down, up = (
        np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(bound["up_tsd"])
    )
    low = (np.asarray(x, np.float64) @ down.reshape(6, -1)) @ up.reshape(-1, 6)
    h = jax.nn.gelu(jnp.asarray(base + low.reshape(base.shape)).astype(jnp.bfloat16))
    out = jnp.einsum("bthk,hkd->btd", h, params["down"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(y, x + out)


class Raw(nn.Module):
    """Return a contraction, and more where told to."""

    more: Any = lambda y: y

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(1.0), (5, 6))
        return type(self).more(jnp.einsum("bti,oi->bto", x, weight))


class Summed(Raw):
    more: Any = lambda y: y.sum()


class Paired(Raw):
    more: Any = lambda y: (y, y)


def raw(module: nn.Module, x: jax.Array) -> Call:
    del module
    return Call("weight", x, "bti,oi->bto")


@pytest.mark.parametrize(
    ("kind", "words"), [(Summed, "the product goes through"), (Paired, "twice")]
)
def test_a_handler_of_a_module_that_does_more_is_refused(kind, words):
    model, x = kind(), inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rules = [Rule(pattern="weight", rank=2, directions=2)]
    line = f"weight is contracted, and .*{words}.*library's einsum"
    with pytest.raises(InputError, match=line):
        make_spec(model.apply, variables, rules, x, handlers={**HANDLERS, kind: raw})


@pytest.mark.parametrize(
    "subscripts", ["bti,io->bto", "bti,oi->bot", "tbi,oi->bto", "bti,oi->boi"]
)
def test_a_handler_that_describes_something_else_is_refused(subscripts):
    class Square(nn.Module):
        @nn.compact
        def __call__(self, x):
            weight = self.param("weight", nn.initializers.normal(1.0), (6, 6))
            return jnp.einsum("bti,oi->bto", x, weight)

    model, x = Square(), inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rules = [Rule(pattern="weight", rank=2, directions=2)]

    def wrong(module: nn.Module, x: jax.Array) -> Call:
        del module
        return Call("weight", x, subscripts)

    with pytest.raises(InputError, match=r"weight: its handler describes.*correct"):
        make_spec(model.apply, variables, rules, x, handlers={Square: wrong})


def test_a_raw_einsum_needs_no_handler():
    model, x = Raw(), inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rules = [Rule(pattern="weight", rank=2, directions=2)]
    spec = make_spec(model.apply, variables, rules, x)
    assert spec.kernels[0].layout == Layout((), (1,), (0,))
    same = make_spec(model.apply, variables, rules, x, handlers={**HANDLERS, Raw: raw})
    assert same == spec
