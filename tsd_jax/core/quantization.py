"""Kernels stored in int8 or nf4 and dequantized where they are used.

    K = scale o values,   one scale for every tile of the input axis and every output

A `Quantized` kernel replaces its array in the parameter tree. It is a Flax box:
`self.param` unboxes it, so that the model does not know of it, and lifted transforms
slice its arrays as they slice others. Inside a scan one layer at a time is in floats.
The number formats are qwix's (nf4: QLoRA, arXiv:2305.14314, without double
quantization).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError, check_choice
from tsd_jax.core.types import Leaf

FORMATS: Mapping[str, int] = {"int8": 128, "nf4": 64}
"""Each format and the size of its tiles, unless another one is asked for."""


class Quantized(struct.PyTreeNode, meta.AxisMetadata):
    """A quantized kernel of any number of axes, in place of its array.

    nf4 packs two 4-bit codes, neighbors along the input axis, into one byte. It does
    not use uint4, which XLA's CPU backend unpacks for a whole stack before a scan, and
    which JAX cannot pass to a program compiled ahead of time.

    Attributes:
      values: int8 of the kernel's shape; for nf4 uint8 with half the input axis.
      scale: float32 of the kernel's shape, but with one entry per tile along the input
        axis.
      format: a key of FORMATS.
      dtype: type of the kernel where it is used.
    """

    values: Leaf
    scale: Leaf
    format: str = struct.field(pytree_node=False)
    dtype: np.dtype = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        shape = list(self.values.shape)
        if self.format == "nf4":
            shape[self._packed_axis] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that values and scales take."""
        return self.values.size + self.scale.size * self.scale.dtype.itemsize

    @property
    def _packed_axis(self) -> int:
        """Input axis of nf4: the one where a tile holds more than one byte."""
        sizes = zip(self.values.shape, self.scale.shape, strict=True)
        return next(n for n, (values, tiles) in enumerate(sizes) if values != tiles)

    def unbox(self) -> Float[Array, "..."]:
        """Return the kernel in its `dtype`: multiplied in float32, rounded once."""
        qwix = _qwix()
        values = self.values
        if self.format == "nf4":
            pairs = jnp.stack([values & 15, values >> 4], self._packed_axis + 1)
            values = pairs.reshape(self.shape)
        parts = qwix.QArray(values, self.scale, qtype=self.format)
        return qwix.dequantize(parts).astype(self.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """Return the new value as it is: it is no longer quantized.

        Args:
          val: what takes the kernel's place.
        """
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        """Return the same kernel: its arrays gain the axis themselves.

        Args:
          index: position of the axis.
          params: metadata of the transform.
        """
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        """Return the same kernel: its arrays lose the axis themselves.

        Args:
          index: position of the axis.
          params: metadata of the transform.
        """
        del index, params
        return self


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How kernels are quantized; hashable.

    Attributes:
      format: a key of FORMATS.
      tile: number of neighbors along the input axis that share a scale; 0 for the
        format's default.
      axis: the input axis, counted from the end.
    """

    format: str
    tile: int = 0
    axis: int = -2

    def __post_init__(self):
        """Refuse settings that fit no kernel."""
        check_choice("quantization", self.format, FORMATS)
        if self.tile < 0:
            raise InputError(f"a tile must have at least 1 element, not {self.tile}")
        if self.format == "nf4" and self.size % 4:
            raise InputError(f"nf4 needs a tile divisible by 4, not {self.tile}")

    @property
    def size(self) -> int:
        """Size of a tile."""
        return self.tile or FORMATS[self.format]

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise InputError unless tiles divide a kernel.

        Args:
          path: path of the kernel, for the message.
          shape: shape of the kernel.
        """
        if len(shape) < 2:
            raise InputError(
                f"{path} of shape {shape} is not a kernel and cannot be quantized: "
                "leave it out of the pattern"
            )
        size = shape[self.axis]
        if size % self.size:
            step = 4 if self.format == "nf4" else 1
            most = [n for n in range(step, self.size, step) if size % n == 0]
            way = f"use a tile of {most[-1]}" if most else "leave it out"
            raise InputError(
                f"{path}: its input axis of {size} is not a multiple of the "
                f"{self.format} tile of {self.size}; {way}"
            )

    def quantize(
        self, kernel: Float[Array, "..."], dtype: DTypeLike | None = None
    ) -> Quantized:
        """Return a kernel rounded to this format.

        Args:
          kernel: (..., in, out), any float type.
          dtype: type of the kernel where it is used; None for its own.
        """
        axis = self.axis % kernel.ndim
        parts = _qwix().quantize(
            kernel.astype(jnp.float32),
            self.format,
            channelwise_axes=tuple(n for n in range(kernel.ndim) if n != axis),
            tiled_axes={axis: self.size},
        )
        used = np.dtype(kernel.dtype if dtype is None else dtype)
        values = parts.qvalue
        if self.format == "nf4":
            values = _packed(values.astype(jnp.uint8), axis)
        return Quantized(values, parts.scale, self.format, used)


def _packed(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Return 4-bit codes packed two to a byte along an axis, the first one low."""
    even = jax.lax.slice_in_dim(codes, 0, None, 2, axis)
    odd = jax.lax.slice_in_dim(codes, 1, None, 2, axis)
    return even | (odd << 4)


def quantize(
    params: Mapping[str, Any],
    quantization: Quantization | str,
    pattern: str,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Quantize every parameter whose whole path matches, one after the other.

    Args:
      params: the parameter tree, of arrays or ShapeDtypeStructs.
      quantization: how to quantize, or the name of a format.
      pattern: regular expression over "/"-joined paths, matched in full.
      dtype: type of the kernels where they are used; None for each kernel's own.

    Returns:
      A new tree with a `Quantized` leaf for each match; the other leaves are the same.

    Raises:
      InputError: nothing matches, or tiles do not divide a kernel.
    """
    if isinstance(quantization, str):
        quantization = Quantization(format=quantization)
    flat = paths.flatten(params)
    chosen = [path for path in flat if re.fullmatch(pattern, path)]
    if not chosen:
        raise InputError(f"quantization: {pattern!r} matches no parameter")
    for path in chosen:
        quantization.check(path, tuple(flat[path].shape))
    run = jax.jit(functools.partial(quantization.quantize, dtype=dtype))
    for path in chosen:
        abstract = isinstance(flat[path], jax.ShapeDtypeStruct)
        flat[path] = jax.eval_shape(run, flat[path]) if abstract else run(flat[path])
    return paths.unflatten(flat)


def dequantize(kernel: Any) -> Any:
    """Return a kernel as an array of floats.

    Args:
      kernel: an array or a `Quantized` kernel.
    """
    return kernel.unbox() if isinstance(kernel, Quantized) else kernel


def stored(kernel: Any) -> Any:
    """Return the array that tells a kernel's devices and sharding.

    Args:
      kernel: an array or a `Quantized` kernel.
    """
    return kernel.values if isinstance(kernel, Quantized) else kernel


def cut_shape(kernel: Any) -> tuple[int, ...]:
    """Return the sizes a mesh must divide: for a quantized kernel, the scales' shape.

    Args:
      kernel: an array or a `Quantized` kernel, or their ShapeDtypeStructs.
    """
    return tuple((kernel.scale if isinstance(kernel, Quantized) else kernel).shape)


def _qwix() -> Any:
    """Return the qwix module, imported on first use."""
    try:
        import qwix
    except ImportError:
        raise InputError(
            "quantized kernels need qwix: pip install qwix, or leave the base as it is"
        ) from None
    return qwix
