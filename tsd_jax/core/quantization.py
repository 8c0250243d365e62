"""Kernels in int8 or nf4 that give themselves back as floats where they are used.

    K = scale o values,   one scale for every tile of the input axis and every output

A `Quantized` kernel lies in the parameter tree in place of its array. It is a Flax box:
`self.param` opens it, so the model need not know of it, and lifted transforms slice its
parts as they slice arrays. Inside a scan one layer is a float at a time. The number
formats are qwix's (nf4: QLoRA, arXiv:2305.14314, without its second quantization).
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
from jax.typing import DTypeLike

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.types import Leaf

FORMATS: Mapping[str, int] = {"int8": 128, "nf4": 64}
"""The size of a tile of each format, unless another is asked for."""


class Quantized(struct.PyTreeNode, meta.AxisMetadata):
    """Hold a kernel of any number of axes, in the place of its array.

    Two places in nf4's table lie in one byte, neighbours along the input axis, and not
    as uint4, which XLA's CPU backend unpacks as a whole stack before a scan, and which
    JAX cannot hand to a program compiled ahead.

    Attributes:
      values: int8 of the kernel's shape; for nf4 uint8 of half the input axis.
      scale: float32, of the kernel's shape but for the input axis, which counts tiles.
      format: of FORMATS. dtype: of the kernel where it is used.
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
        """Bytes that both parts take."""
        return self.values.size + self.scale.size * self.scale.dtype.itemsize

    @property
    def _packed_axis(self) -> int:
        """Find the input axis: of nf4, tiles hold more than one byte of it."""
        sizes = zip(self.values.shape, self.scale.shape, strict=True)
        return next(n for n, (values, tiles) in enumerate(sizes) if values != tiles)

    def unbox(self) -> jax.Array:
        """Return the kernel as floats: multiplied in float32, rounded once."""
        qwix = _qwix()
        values = self.values
        if self.format == "nf4":
            pairs = jnp.stack([values & 15, values >> 4], self._packed_axis + 1)
            values = pairs.reshape(self.shape)
        parts = qwix.QArray(values, self.scale, qtype=self.format)
        return qwix.dequantize(parts).astype(self.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """Hold another value from the same place, which is no longer quantized."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        """Do nothing: the parts gain the axis themselves."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Quantized:
        """Do nothing: the parts lose the axis themselves."""
        del index, params
        return self


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Say how kernels are quantized; hashable.

    Attributes:
      format: of FORMATS.
      tile: neighbours along the input axis that share a scale; 0 for the format's.
      axis: the input axis, counted from the end.
    """

    format: str
    tile: int = 0
    axis: int = -2

    def __post_init__(self):
        """Refuse what no kernel could have."""
        if self.format not in FORMATS:
            raise InputError(
                f"unknown quantization {self.format!r}; choose one of "
                f"{', '.join(FORMATS)}"
            )
        if self.tile < 0:
            raise InputError(f"a tile of {self.tile} makes no sense: use at least 1")
        if self.format == "nf4" and self.size % 4:
            raise InputError(f"nf4 needs a tile that 4 divides, not {self.tile}")

    @property
    def size(self) -> int:
        """Size of a tile."""
        return self.tile or FORMATS[self.format]

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise InputError unless tiles divide the kernel at `path`."""
        if len(shape) < 2:
            raise InputError(f"{path} of shape {shape} is no kernel: leave it as it is")
        size = shape[self.axis]
        if size % self.size:
            step = 4 if self.format == "nf4" else 1
            most = [n for n in range(step, self.size, step) if size % n == 0]
            way = f"use a tile of {most[-1]}" if most else "leave it out"
            raise InputError(
                f"{path}: its input axis of {size} is no multiple of the "
                f"{self.format} tile of {self.size}; {way}"
            )

    def quantize(self, kernel: jax.Array, dtype: DTypeLike | None = None) -> Quantized:
        """Round a kernel (..., in, out); `dtype` is that of its use, or its own."""
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


def _packed(places: jax.Array, axis: int) -> jax.Array:
    """Put two neighbours of 4 bits into one byte, the first one low."""
    even = jax.lax.slice_in_dim(places, 0, None, 2, axis)
    odd = jax.lax.slice_in_dim(places, 1, None, 2, axis)
    return even | (odd << 4)


def quantize(
    params: Mapping[str, Any],
    quantization: Quantization | str,
    pattern: str,
    dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """Quantize every parameter whose whole path matches, one after the other.

    Args:
      params: the tree; arrays or ShapeDtypeStructs.
      quantization: how, or the name of a format.
      pattern: regular expression over "/"-joined paths.
      dtype: of the kernels where they are used; None for each kernel's own.

    Returns:
      A new tree with a `Quantized` leaf for each of them; the others are passed on.

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
    """Return a kernel as an array of floats, quantized or not."""
    return kernel.unbox() if isinstance(kernel, Quantized) else kernel


def stored(kernel: Any) -> Any:
    """Return the array that lies where a kernel lies, quantized or not."""
    return kernel.values if isinstance(kernel, Quantized) else kernel


def cut_shape(kernel: Any) -> tuple[int, ...]:
    """Return the sizes a mesh must divide: those of the scales of a quantized kernel."""
    return tuple((kernel.scale if isinstance(kernel, Quantized) else kernel).shape)


def _qwix() -> Any:
    """Import qwix where it is needed."""
    try:
        import qwix
    except ImportError:
        raise InputError(
            "quantized kernels need qwix: pip install qwix, or leave the base as it is"
        ) from None
    return qwix
