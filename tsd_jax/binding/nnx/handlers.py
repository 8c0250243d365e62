"""What each NNX module contracts: the one place that knows module types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from tsd_jax.binding.calls import Call, Handler
from tsd_jax.binding.contraction import general_subscripts


def _bias(module: nnx.Linear | nnx.LinearGeneral | nnx.Einsum) -> str | None:
    return None if module.bias is None else "bias"


def linear(module: nnx.Linear, inputs: jax.Array, out_sharding: Any = None) -> Call:
    """Describe `nnx.Linear`: the last axis is contracted."""
    del out_sharding
    return Call("kernel", inputs, "...a,ab->...b", _bias(module))


def linear_general(
    module: nnx.LinearGeneral, inputs: jax.Array, out_sharding: Any = None
) -> Call:
    """Describe `nnx.LinearGeneral`: `axis` contracted, `out_features` produced."""
    del out_sharding
    features = len(module.out_features)
    subscripts = general_subscripts(
        inputs.ndim, module.axis, tuple(module.batch_axis), features
    )
    return Call("kernel", inputs, subscripts, _bias(module))


def einsum(
    module: nnx.Einsum,
    inputs: jax.Array,
    einsum_str: str | None = None,
    out_sharding: Any = None,
) -> Call:
    """Describe `nnx.Einsum`: its own subscripts."""
    del out_sharding
    return Call("kernel", inputs, einsum_str or module.einsum_str, _bias(module))


HANDLERS: Mapping[type[nnx.Module], Handler] = {
    nnx.Linear: linear,
    nnx.LinearGeneral: linear_general,
    nnx.Einsum: einsum,
}
