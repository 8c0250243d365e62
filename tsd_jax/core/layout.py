"""Which axes of a kernel are stacked, contracted and produced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tsd_jax.core.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Name the role of every axis of a stored kernel.

    A scanned `DenseGeneral((heads, size))` of kernel shape
    (layers, width, heads, size) is `Layout(batch=(0,), inputs=(1,), outputs=(2, 3))`:
    a stack of `layers` matrices (width, heads * size).

    Attributes:
      batch: axes that stack independent matrices (layers, experts), ascending.
      inputs: contracted axes, in the order in which they are flattened.
      outputs: produced axes, in the order in which they are flattened.
      lifted: the batch axes the owning module never sees, because a transform
        (`nn.scan`, `nn.vmap`) takes them away; always as traced, never by rule.
    """

    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)
    lifted: tuple[int, ...] = ()

    def validate(self, path: str, ndim: int) -> None:
        """Raise InputError unless the axes are those of an array of rank `ndim`."""
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
        """Batch axes counted as the owning module sees the kernel."""
        return tuple(
            axis - sum(lifted < axis for lifted in self.lifted)
            for axis in self.batch
            if axis not in self.lifted
        )

    @property
    def visible(self) -> Layout:
        """The layout of the kernel as the owning module sees it."""

        def seen(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(
                axis - sum(lifted < axis for lifted in self.lifted) for axis in axes
            )

        return Layout(self.visible_batch, seen(self.inputs), seen(self.outputs))

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of the stored kernel in the order batch, inputs, outputs."""
        return (*self.batch, *self.inputs, *self.outputs)

    def shape(self, kernel_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (*batch, in, out) of the kernel seen as stacked matrices."""
        return (
            *(kernel_shape[axis] for axis in self.batch),
            math.prod(kernel_shape[axis] for axis in self.inputs),
            math.prod(kernel_shape[axis] for axis in self.outputs),
        )

    def to_matrices(self, kernel: jax.Array) -> jax.Array:
        """View a stored kernel as matrices, shape (*batch, in, out)."""
        return jnp.transpose(kernel, self.order).reshape(self.shape(kernel.shape))

    def from_matrices(self, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Store matrices (*batch, in, out) as a kernel of `shape`."""
        permuted = matrices.reshape(tuple(shape[axis] for axis in self.order))
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(permuted, inverse)
