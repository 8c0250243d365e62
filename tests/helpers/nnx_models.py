"""Small NNX models with every kind of linear module, stacked in many ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.helpers.trees import filled

WIDTH, LAYERS = 6, 3


class Mixer(nnx.Module):
    """Every kind of linear module once; maps (..., T, 6) to (..., T, 6)."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        kinds: Any = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.heads = nnx.LinearGeneral(WIDTH, (2, 4), **kinds)
        self.each = nnx.Einsum("...hd,hde->...he", (2, 4, 5), (2, 5), **kinds)
        self.join = nnx.LinearGeneral((2, 5), WIDTH, axis=(-1, -2), **kinds)
        self.mix = nnx.Linear(WIDTH, WIDTH, **kinds)

    def __call__(self, x):
        return x + self.mix(jnp.tanh(self.join(self.each(self.heads(x)))))


def stacked(axis: int, length: int = LAYERS, make: Any = Mixer) -> Any:
    """Return one module whose parameters are those of many, stacked on an axis."""

    @nnx.split_rngs(splits=length)
    @nnx.vmap(in_axes=(0,), out_axes=axis)
    def create(rngs):
        return make(rngs)

    return create(nnx.Rngs(0))


def scanned(x, layers, axis: int = 0):
    """Apply stacked layers one after the other, with remat."""

    @nnx.scan(in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
    @nnx.remat
    def apply(x, layer):
        return layer(x)

    return apply(x, layers)


def in_parallel(x, layers, axis: int = 0):
    """Return the sum of all stacked layers applied to x."""

    @nnx.vmap(in_axes=(None, axis))
    def apply(x, layer):
        return layer(x)

    return apply(x, layers).sum(0)


def by_hand(x, layers):
    """Apply stacked layers by `jax.lax.scan` over the split state."""
    graphdef, state = nnx.split(layers)
    body = lambda x, state: (nnx.merge(graphdef, state)(x), None)  # noqa: E731
    return jax.lax.scan(body, x, state)[0]


def by_index(x, layers):
    """Apply stacked layers by index: the first directly, the others in a fori_loop."""
    graphdef, state = nnx.split(layers)

    def one(n, x):
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[n], state))(x)

    return jax.lax.fori_loop(1, LAYERS, one, one(0, x))


class Net(nnx.Module):
    """Scanned layers, layers in parallel, Flax's attention, and a head."""

    def __init__(self, axis: int = 0):
        rngs = nnx.Rngs(1)
        self.axis = axis
        self.scanned = stacked(axis)
        self.parallel = stacked(0, 2, lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)]
        )
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = scanned(x, self.scanned, self.axis)
        x = x + in_parallel(x, self.parallel)
        for attention in self.attention:
            x = x + attention(x)
        return self.head(x)


def made(create: Callable[[], Any], seed: int = 0, scale: float = 0.4) -> Any:
    """Return a model with random normal parameters, without compiling anything."""
    graphdef, state = nnx.split(nnx.eval_shape(create))
    return nnx.merge(graphdef, filled(seed, state, scale))


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    """Return two examples of three positions."""
    return filled(7, jax.ShapeDtypeStruct((2, 3, WIDTH), dtype))
