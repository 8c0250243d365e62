"""What each Linen module contracts: the one place that knows module types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from tsd_jax.binding.contraction import Contraction, general_subscripts


class Call(NamedTuple):
    """Describe one call of a linear module.

    Attributes:
      kernel: name of the parameter.
      x: the input it is contracted with.
      subscripts: the contraction "x,kernel->y" as for `jnp.einsum`.
      bias: name of the parameter that is added to the contraction, with the axes of y
        that the kernel has; DoRA needs to know it. None where there is none.
    """

    kernel: str
    x: jax.Array
    subscripts: str
    bias: str | None = None

    @property
    def contraction(self) -> Contraction:
        """The labels of the three arrays."""
        return Contraction.parse(self.subscripts, self.x.ndim)


Handler = Callable[..., Call]


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


def find_handler(module: object, handlers: Mapping[Any, Handler]) -> Handler | None:
    """Look up the handler of a module's class or its nearest base class."""
    for base in type(module).__mro__:
        if base in handlers:
            return handlers[base]
    return None
