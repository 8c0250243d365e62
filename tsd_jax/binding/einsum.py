"""An einsum inside a module that adapters reach, whatever the module does besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsd_jax.binding.bound import Bound
from tsd_jax.binding.calls import EINSUM, Call
from tsd_jax.binding.marks import recorder


class EinsumCall(NamedTuple):
    """What an einsum is called with.

    Attributes:
      subscripts: "x,kernel->y".
      x: the first operand.
      dtype: both operands are cast to it; None leaves them as they are.
      settings: of `jnp.einsum`.
    """

    subscripts: str
    x: jax.Array
    dtype: Any
    settings: Mapping[str, Any]

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Contract x with a kernel.

        Args:
          x: the input.
          kernel: the parameter.
        """
        if self.dtype is not None:
            x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.einsum(self.subscripts, x, kernel, **self.settings)


def run_einsum(
    call: EinsumCall,
    read: Callable[[str], jax.Array],
    name: str,
    module: str,
    candidates: Mapping[str, int],
    beside: Mapping[str, Bound],
) -> jax.Array:
    """Contract an input with a parameter, and add what its adapter adds.

    Args:
      call: the einsum.
      read: name -> parameter of the module.
      name: of the parameter.
      module: path or type of the module, for messages.
      candidates: {parameter: number} of the module, while a trace is going on.
      beside: {kernel: its adapter} of the module.
    """
    kernel, trace = read(name), recorder()
    if trace is not None and name in candidates:
        owned = {candidates[name]: kernel}
        arguments = {"x": call.x}
        return trace.run(
            EINSUM, module, owned, arguments, lambda given: call(given["x"], kernel)
        )
    y = call(call.x, kernel)
    if name not in beside:
        return y
    return beside[name](Call(name, call.x, call.subscripts), y, read)
