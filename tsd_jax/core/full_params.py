"""Fully trained parameters beside the adapters: heads, norms, new embedding rows.

The value itself trains, not its difference to the base, in the adapters' type. A file
of it is therefore complete even where no checkpoint has the parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from tsd_jax.core.errors import InputError
from tsd_jax.core.paths import check_pattern
from tsd_jax.core.types import Leaf


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train every parameter whose whole path matches `pattern` in full, without rank.

    Listed among the rules of adapters; the first match wins.

    Attributes:
      pattern: regular expression over "/"-joined paths, matched in full.
      rows: (start, stop) of the part of one axis that trains, such as the embedding
        rows of added tokens; None for all of it.
      axis: the axis that `rows` counts along; 1 for a head's kernel (in, vocabulary).
    """

    pattern: str
    rows: tuple[int, int] | None = None
    axis: int = 0

    def __post_init__(self):
        """Refuse values that fit no parameter."""
        where = f"rule {self.pattern!r}"
        check_pattern(self.pattern, where=where)
        if self.rows is None:
            return
        if len(self.rows) != 2 or not 0 <= self.rows[0] < self.rows[1]:
            raise InputError(
                f"{where}: rows must be (start, stop), 0 <= start < stop, not "
                f"{self.rows}"
            )
        if self.axis < 0:
            raise InputError(f"{where}: axis must be 0 or more, not {self.axis}")


@dataclass(frozen=True, kw_only=True)
class FullSpec:
    """The static description of one fully trained parameter, or of some of its rows.

    Attributes:
      path: "/"-joined path in the parameter tree.
      shape: shape of the parameter, as stored.
      rows: (start, stop) of what trains, or None for all of it.
      axis: the axis that `rows` counts along.
    """

    path: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    axis: int = 0

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of what trains."""
        if self.rows is None:
            return self.shape
        count = self.rows[1] - self.rows[0]
        return (*self.shape[: self.axis], count, *self.shape[self.axis + 1 :])

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return math.prod(self.value_shape)


class FullParam(struct.PyTreeNode):
    """The trained value of one parameter, or of its rows.

    Attributes:
      value: (`part.value_shape`), float32.
      part: the parameter's static description.
    """

    value: Leaf
    part: FullSpec = struct.field(pytree_node=False)


def full_spec(path: str, leaf: Any, rule: Full) -> FullSpec:
    """Return what of a parameter trains.

    Args:
      path: path of the parameter.
      leaf: the parameter, an array or ShapeDtypeStruct.
      rule: the rule that matched it.

    Raises:
      InputError: the parameter is quantized, is not of a float type, or lacks the rows.
    """
    if isinstance(leaf, meta.AxisMetadata):
        raise InputError(
            f"{path} is quantized or boxed and cannot train in full: load it in a "
            "float type, or leave it out of the rules"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(
            f"{path} is of type {leaf.dtype} and cannot train: leave it out of the "
            "rules"
        )
    shape = tuple(leaf.shape)
    sizes = shape[rule.axis : rule.axis + 1]
    if rule.rows is not None and not (sizes and rule.rows[1] <= sizes[0]):
        raise InputError(
            f"{path} has shape {shape}, and the rule asks for {rule.rows} along axis "
            f"{rule.axis}"
        )
    return FullSpec(path=path, shape=shape, rows=rule.rows, axis=rule.axis)


def start_full(
    leaf: Float[Array | np.ndarray, "..."], part: FullSpec, dtype: DTypeLike
) -> FullParam:
    """Return a copy of what trains, at the base's value.

    Args:
      leaf: the base's parameter.
      part: what of it trains.
      dtype: type of the copy.

    Raises:
      InputError: the parameter's shape is not the spec's.
    """
    _check_shape(leaf, part)
    if part.rows is not None:
        leaf = jax.lax.slice_in_dim(leaf, *part.rows, axis=part.axis)
    # Copied even where nothing is cast: donating the state must not free the base.
    return FullParam(jnp.array(leaf, dtype, copy=True), part)


def place_full(
    leaf: Float[Array | np.ndarray, "*shape"],
    trained: FullParam,
    dtype: DTypeLike | None = None,
) -> Float[Array | np.ndarray, "*shape"]:
    """Return a parameter with its trained value in place.

    Args:
      leaf: the base's parameter.
      trained: its trained value.
      dtype: type of the result; None for the base's.

    Raises:
      InputError: the parameter's shape is not the spec's.
    """
    part = trained.part
    _check_shape(leaf, part)
    dtype = dtype or leaf.dtype
    value = trained.value.astype(dtype)
    if part.rows is None:
        return value
    # Padded and selected rather than updated in place: a sharded axis stays sharded.
    start, stop = part.rows
    size = part.shape[part.axis]
    padding = [(0, 0)] * len(part.shape)
    padding[part.axis] = (start, size - stop)
    inside = (jnp.arange(size) >= start) & (jnp.arange(size) < stop)
    others = [axis for axis in range(len(part.shape)) if axis != part.axis]
    chosen = jnp.expand_dims(inside, others)
    return jnp.where(chosen, jnp.pad(value, padding), leaf.astype(dtype))


def _check_shape(leaf: Array | np.ndarray, part: FullSpec) -> None:
    if tuple(leaf.shape) != part.shape:
        raise InputError(
            f"{part.path} has shape {tuple(leaf.shape)}, and the spec was made for "
            f"{part.shape}"
        )
