"""The low-rank path of any two-operand contraction, as two einsums."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters

import jax
import jax.numpy as jnp

from tsd_jax.core.errors import InputError


@dataclass(frozen=True)
class Contraction:
    """Split the subscripts "x,kernel->y" of a linear module into their labels.

    Attributes:
      x: labels of the input. kernel: of the kernel. y: of the output; one letter an
        axis.
    """

    x: str
    kernel: str
    y: str

    @classmethod
    def parse(cls, subscripts: str, ndim: int) -> Contraction:
        """Read explicit subscripts, with an ellipsis spelled out for `ndim` inputs.

        Raises:
          InputError: not of the form "x,kernel->y", or a label stands twice in one
            operand or in the kernel alone.
        """
        text = subscripts.replace(" ", "")
        operands, arrow, y = text.partition("->")
        x, comma, kernel = operands.partition(",")
        if not (arrow and comma) or "," in kernel or "..." in kernel:
            raise InputError(
                f"{subscripts!r} is not of the form 'x,kernel->y' with a kernel "
                "whose axes are all named"
            )
        if "..." in x:
            free = [c for c in ascii_letters if c not in text]
            more = "".join(free[: ndim - len(x.replace("...", ""))])
            x, y = x.replace("...", more), y.replace("...", more)
        parsed = cls(x, kernel, y)
        repeated = any(len(set(labels)) < len(labels) for labels in (x, kernel, y))
        if repeated or not set(kernel) <= set(x) | set(y):
            raise InputError(
                f"{subscripts!r}: an axis label stands twice in one operand, or in "
                "the kernel alone; such a kernel has no low-rank path"
            )
        return parsed

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the kernel's batch, input and output axes, by who shares a label."""
        roles: tuple[list[int], list[int], list[int]] = ([], [], [])
        for axis, label in enumerate(self.kernel):
            role = 0 if label in self.x and label in self.y else 1 + (label in self.y)
            roles[role].append(axis)
        return tuple(roles[0]), tuple(roles[1]), tuple(roles[2])

    def y_shape(self, x: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the contraction of arrays of these shapes."""
        sizes = dict(zip(self.x + self.kernel, (*x, *kernel), strict=True))
        return tuple(sizes[label] for label in self.y)


def general_subscripts(
    ndim: int, contracted: Sequence[int], stacked: Sequence[int], features: int
) -> str:
    """Write `DenseGeneral`'s contraction: some axes contracted, some produced.

    Flax sorts the axes, so that (-1, -2) and (-2, -1) are the same module.

    Args:
      ndim: of the input.
      contracted: its contracted axes. stacked: its axes that stack kernels.
      features: number of axes produced.
    """
    contracted, stacked = (
        sorted(axis % ndim for axis in axes) for axes in (contracted, stacked)
    )
    x, produced = ascii_letters[:ndim], ascii_letters[ndim : ndim + features]
    batch = "".join(x[axis] for axis in stacked)
    kernel = batch + "".join(x[axis] for axis in contracted) + produced
    free = (x[axis] for axis in range(ndim) if axis not in (*contracted, *stacked))
    return f"{x},{kernel}->{batch}{''.join(free)}{produced}"


def spread_outputs(
    values: jax.Array,
    contraction: Contraction,
    *,
    batch: tuple[int, ...],
    y_shape: tuple[int, ...],
) -> jax.Array:
    """Lay one value an output along the axes of y, ready to be broadcast.

    Args:
      values: (*batch, out), out flattened.
      contraction: labels of x, kernel and y.
      batch: the kernel's axes that stack matrices.
      y_shape: shape of the module's output.

    Returns:
      An array of as many axes as y, 1 where the kernel has none.
    """
    sizes = dict(zip(contraction.y, y_shape, strict=True))
    stacked = [contraction.kernel[axis] for axis in batch]
    outputs = [c for c in contraction.kernel if c not in (*contraction.x, *stacked)]
    labels = [*stacked, *outputs]
    split = values.reshape([sizes[c] for c in labels])
    order = sorted(range(len(labels)), key=lambda n: contraction.y.index(labels[n]))
    shape = [sizes[c] if c in labels else 1 for c in contraction.y]
    return jnp.transpose(split, order).reshape(shape)


def low_rank(
    x: jax.Array,
    down: jax.Array,
    up: jax.Array,
    contraction: Contraction,
    *,
    batch: tuple[int, ...],
    y_shape: tuple[int, ...],
) -> jax.Array:
    """Compute x . (down @ up) without ever forming the product.

    Args:
      x: the module's input.
      down: (*batch, in, R). up: (*batch, R, out); in and out flattened.
      contraction: labels of x, kernel and y.
      batch: the kernel's axes that stack matrices; they stay in between.
      y_shape: shape of the module's output.

    Returns:
      An array of `y_shape`, accumulated in the factors' type (float32).
    """
    sizes = dict(zip(contraction.x, x.shape, strict=True))
    sizes |= dict(zip(contraction.y, y_shape, strict=True))
    stacked = "".join(contraction.kernel[axis] for axis in batch)
    rest = [c for c in contraction.kernel if c not in stacked]
    inputs = "".join(c for c in rest if c in contraction.x)
    outputs = "".join(c for c in rest if c not in contraction.x)
    rank = next(c for c in ascii_letters if c not in sizes)

    def split(factor: jax.Array, labels: str) -> jax.Array:
        shape = [factor.shape[-1] if c == rank else sizes[c] for c in labels]
        if labels[-1] != rank:
            shape[labels.index(rank)] = factor.shape[-2]
        return factor.reshape(shape)

    free = [c for c in contraction.x if c not in inputs and c not in stacked]
    middle = "".join(free) + stacked + rank
    a, b = stacked + inputs + rank, stacked + rank + outputs
    einsum = functools.partial(jnp.einsum, preferred_element_type=down.dtype)
    hidden = einsum(
        f"{contraction.x},{a}->{middle}",
        x.astype(down.dtype),
        split(down, a),
    )
    return einsum(f"{middle},{b}->{contraction.y}", hidden, split(up, b))
