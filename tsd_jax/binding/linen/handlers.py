"""What each Linen module contracts: the one place that knows module types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax

from tsd_jax.binding.calls import Call, Handler
from tsd_jax.binding.contraction import general_subscripts


def _bias(module: nn.Dense | nn.DenseGeneral | nn.Einsum) -> str | None:
    return "bias" if module.use_bias else None


def dense(module: nn.Dense, inputs: jax.Array) -> Call:
    """Describe `nn.Dense`: the last axis is contracted."""
    return Call("kernel", inputs, "...a,ab->...b", _bias(module))


def dense_general(module: nn.DenseGeneral, inputs: jax.Array) -> Call:
    """Describe `nn.DenseGeneral`: `axis` contracted, `features` produced."""

    def several(value: int | Sequence[int]) -> Sequence[int]:
        return (value,) if isinstance(value, int) else value

    axes = several(module.axis), several(module.batch_dims)
    features = len(several(module.features))
    subscripts = general_subscripts(inputs.ndim, *axes, features)
    return Call("kernel", inputs, subscripts, _bias(module))


def einsum(module: nn.Einsum, inputs: jax.Array, einsum_str: str | None = None) -> Call:
    """Describe `nn.Einsum`: its own subscripts."""
    subscripts = einsum_str or module.einsum_str or ""
    return Call("kernel", inputs, subscripts, _bias(module))


HANDLERS: Mapping[type[nn.Module], Handler] = {
    nn.Dense: dense,
    nn.DenseGeneral: dense_general,
    nn.Einsum: einsum,
}
