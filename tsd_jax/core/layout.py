"""The roles of a kernel's axes: stacked, contracted or produced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Shaped

from tsd_jax.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """The role of every axis of a stored kernel.

    A scanned `DenseGeneral((heads, size))` of kernel shape
    (layers, width, heads, size) is `Layout(batch=(0,), inputs=(1,), outputs=(2, 3))`:
    a stack of `layers` matrices (width, heads * size).

    Attributes:
      batch: axes that stack independent matrices (layers, experts), ascending.
      inputs: contracted axes, in the order in which they are flattened.
      outputs: produced axes, in the order in which they are flattened.
      lifted: batch axes that the owning module never sees, because a transform
        (`nn.scan`, `nn.vmap`) removes them; found by tracing, never set by a rule.
    """

    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)
    lifted: tuple[int, ...] = ()

    def validate(self, path: str, ndim: int) -> None:
        """Raise InputError unless the axes are those of an array of a given rank.

        Args:
          path: path of the kernel, for the message.
          ndim: rank of the array.
        """
        axes = (*self.batch, *self.inputs, *self.outputs)
        complete = sorted(axes) == list(range(ndim))
        ordered = list(self.batch) == sorted(self.batch)
        stacked = set(self.lifted) <= set(self.batch)
        if not (complete and ordered and stacked and self.inputs and self.outputs):
            raise InputError(
                f"{path}: {self} does not lay out the {ndim} axes of the kernel; "
                "name each axis once, batch axes ascending and the lifted ones among "
                "them, with at least one input and one output axis"
            )

    @property
    def visible_batch(self) -> tuple[int, ...]:
        """Batch axes, numbered as the owning module sees the kernel."""
        kept = tuple(axis for axis in self.batch if axis not in self.lifted)
        return self._without_lifted(kept)

    @property
    def visible(self) -> Layout:
        """The layout of the kernel as the owning module sees it."""
        return Layout(
            self.visible_batch,
            self._without_lifted(self.inputs),
            self._without_lifted(self.outputs),
        )

    def _without_lifted(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of some axes once the lifted ones are gone."""
        return tuple(
            axis - len([lifted for lifted in self.lifted if lifted < axis])
            for axis in axes
        )

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of the stored kernel in the order batch, inputs, outputs."""
        return (*self.batch, *self.inputs, *self.outputs)

    def shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape (*batch, in, out) of a kernel seen as stacked matrices.

        Args:
          kernel_shape: shape of the stored kernel.
        """
        return (
            *(kernel_shape[axis] for axis in self.batch),
            math.prod(kernel_shape[axis] for axis in self.inputs),
            math.prod(kernel_shape[axis] for axis in self.outputs),
        )

    def to_matrices(
        self, kernel: Shaped[Array | np.ndarray, "..."]
    ) -> Shaped[Array, "*batch in out"]:
        """Return a stored kernel as matrices, (*batch, in, out).

        Args:
          kernel: as stored, any type.
        """
        return jnp.transpose(kernel, self.order).reshape(self.shape(kernel.shape))

    def from_matrices(
        self,
        matrices: Shaped[Array | np.ndarray, "*batch in out"],
        shape: tuple[int, ...],
    ) -> Shaped[Array, "..."]:
        """Return matrices as a stored kernel; the inverse of `to_matrices`.

        Args:
          matrices: (*batch, in, out), any type.
          shape: shape of the stored kernel.
        """
        permuted = matrices.reshape(tuple(shape[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(permuted, inverse)
