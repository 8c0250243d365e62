"""One call of a linear module, as a handler describes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tsd_jax.binding.contraction import Contraction


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
"""(module, *args, **kwargs of its call) -> what that call contracts."""


class Owner(NamedTuple):
    """Describe the module that a call is of.

    Attributes:
      path: in the model, where it is known. kind: name of its type.
      parameters: {name: value} of its own, no child's.
    """

    path: str
    kind: str
    parameters: Mapping[str, Any]


def find_handler(module: object, handlers: Mapping[Any, Handler]) -> Handler | None:
    """Look up the handler of a module's class or its nearest base class."""
    for base in type(module).__mro__:
        if base in handlers:
            return handlers[base]
    return None
