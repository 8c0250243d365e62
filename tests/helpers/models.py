"""Small Linen models with every kind of linear module, under every transform."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.helpers.trees import filled
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.spec import Rule, Spec

WIDTH = 6


class Mixer(nn.Module):
    """Every kind of linear module once; maps (..., T, 6) to (..., T, 6)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        h = nn.DenseGeneral((2, 4), name="heads", **kinds)(x)
        h = nn.Einsum((2, 4, 5), "...hd,hde->...he", name="each", **kinds)(h)
        y = nn.DenseGeneral(WIDTH, axis=(-1, -2), name="join", **kinds)(h)
        return x + nn.Dense(WIDTH, name="mix", **kinds)(jnp.tanh(y)), None


def _scan(block: Any, axis: int = 0, length: int = 3) -> Any:
    return nn.scan(
        block,
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=length,
    )


def _vmap(block: Any) -> Any:
    return nn.vmap(block, variable_axes={"params": 0}, split_rngs={"params": True})


class ScanOfScans(nn.Module):
    """A scan over a block that is itself a scan."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, _=None):
        return _scan(Mixer, axis=1, length=2)(self.dtype, name="inner")(x, None)


LIFTS: dict[str, Any] = {
    "plain": Mixer,
    "remat": nn.remat(Mixer),
    "scan": _scan(Mixer),
    "scan on axis 1": _scan(Mixer, axis=1),
    "scan on the last axis": _scan(Mixer, axis=-1),
    "scan of remat": _scan(nn.remat(Mixer, prevent_cse=False)),
    "remat of scan": nn.remat(_scan(Mixer)),
    "scan of scans": _scan(ScanOfScans),
    "vmap": _vmap(Mixer),
}


class Net(nn.Module):
    """A lifted mixer and a head."""

    lift: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x, _ = LIFTS[self.lift](self.dtype, name="body")(x)
        return nn.Dense(3, dtype=self.dtype, param_dtype=self.dtype, name="head")(x)


def inputs(lift: str, dtype: Any = jnp.float32) -> jax.Array:
    """Return two examples of three positions; for vmap one pair for each block."""
    shape = (3, 2, 3, WIDTH) if lift == "vmap" else (2, 3, WIDTH)
    return filled(7, jax.ShapeDtypeStruct(shape, dtype))


def net(
    lift: str,
    method: Any,
    *,
    pattern: str = r".*/kernel",
    dtype: Any = jnp.float32,
    dropout: float = 0.0,
    dora: bool = False,
) -> tuple[Net, dict[str, Any], Spec]:
    """Return a model, its parameters, and a spec (by default for all five kernels)."""
    model = Net(lift, dtype)
    x = inputs(lift, dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = filled(0, shapes, 0.4)
    rule = Rule(
        pattern=pattern, rank=2, alpha=3, directions=3, dropout=dropout, dora=dora
    )
    spec = make_spec(model.apply, {"params": params}, [rule], x, method=method)
    return model, params, spec


def three_ways(
    model: nn.Module, params: Any, pairs: Any, x: Any, *settings: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the outputs of the factored, the merged and the pretrained model."""

    @jax.jit
    def run(params, pairs, x):
        factored = adapted(model.apply, *settings)({"params": bind(params, *pairs)}, x)
        merged = model.apply({"params": merge(params, *pairs)}, x)
        return factored, merged, model.apply({"params": params}, x)

    return run(params, pairs, x)
