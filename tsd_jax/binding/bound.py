"""What lies beside a kernel while the model runs, and what it adds to a call."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tsd_jax.binding.calls import Call, Owner
from tsd_jax.binding.contraction import low_rank, spread_outputs
from tsd_jax.core.adapter import Adapter, Directions, low_rank_factors, output_scale
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import KernelSpec

SUFFIX = "_tsd"


class Bound(struct.PyTreeNode):
    """Lie beside a kernel: dK = down @ up, stacked axes where the kernel has its own.

    Attributes:
      down: A and L. up: gamma B and diag(g + o) R^T. key: dropout key data, or None.
      scale: c of DoRA, a row, or None.
      batch: stacked axes of the kernel as its module sees it.
      dropout: probability on the input of the low-rank path.
    """

    down: jax.Array
    up: jax.Array
    key: jax.Array | None
    scale: jax.Array | None
    batch: tuple[int, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def __call__(self, call: Call, y: jax.Array, owner: Owner) -> jax.Array:
        """Add (x down) up to a module's output, before rounding to its type."""
        total = y + _low_rank(call, self, y.shape)
        if self.scale is not None:
            row, labels = _unplace(self.scale, self.batch), call.contraction
            c = spread_outputs(row, labels, batch=self.batch, y_shape=y.shape)
            total = c * total + (1 - c) * _bias(call, y, owner)
        return total.astype(y.dtype)


def _place(leaf: jax.Array, kernel: KernelSpec) -> jax.Array:
    """Move a leaf (*batch, m, n) so that its batch axes lie where the kernel's do."""
    batch = kernel.layout.batch
    ones = (1,) * (len(kernel.shape) - len(batch) - 2)
    shape = (*leaf.shape[:-2], *ones, *leaf.shape[-2:])
    return jnp.moveaxis(leaf.reshape(shape), range(len(batch)), batch)


def _unplace(leaf: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Bring a sliced leaf back to (*batch, m, n), batch as the module sees it."""
    moved = jnp.moveaxis(leaf, batch, range(len(batch)))
    return moved.reshape(*moved.shape[: len(batch)], *moved.shape[-2:])


def _dropout_keys(key: jax.Array, kernel: KernelSpec) -> jax.Array:
    """Return every matrix of a stack a key of its own, as data (*batch, 1, words)."""
    own = jax.random.fold_in(key, zlib.crc32(kernel.path.encode()))
    keys = jax.random.split(own, kernel.batch_shape)
    return jax.random.key_data(keys)[..., None, :]


def bound_leaves(
    base: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    directions: Mapping[str, Directions],
    dropout_key: jax.Array | None,
) -> dict[str, Bound]:
    """Return {kernel path: what lies beside that kernel}, its axes where its own are.

    Args:
      base: {path: parameter} of all that is adapted.
      adapters: {path: Adapter}. directions: {path: Directions}.
      dropout_key: a typed key, or None.
    """
    bound = {}
    for path, adapter in adapters.items():
        kernel = adapter.kernel
        down, up = low_rank_factors(adapter, directions[path])
        key = None
        if dropout_key is not None and kernel.dropout > 0:
            key = _dropout_keys(dropout_key, kernel)
        scale = output_scale(adapter, base[path], down, up)
        row = None if scale is None else scale[..., None, :]
        place = functools.partial(_place, kernel=kernel)
        placed = jax.tree.map(place, (down, up, key, row))
        bound[path] = Bound(
            *placed, batch=kernel.layout.visible_batch, dropout=kernel.dropout
        )
    return bound


def _drop(x: jax.Array, key_data: jax.Array, rate: float) -> jax.Array:
    """Drop by one mask over all of x, also where the module itself sees a stack."""
    key = jax.random.wrap_key_data(key_data.reshape(-1, key_data.shape[-1])[0])
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _low_rank(call: Call, bound: Bound, y_shape: tuple[int, ...]) -> jax.Array:
    """Compute what one module's output gains, in the factors' type."""
    x = call.x
    if bound.key is not None:
        x = _drop(x, _unplace(bound.key, bound.batch), bound.dropout)
    return low_rank(
        x,
        _unplace(bound.down, bound.batch),
        _unplace(bound.up, bound.batch),
        call.contraction,
        batch=bound.batch,
        y_shape=y_shape,
    )


def _bias(call: Call, y: jax.Array, owner: Owner) -> jax.Array | float:
    """Return what is added to x K in y, ready to be broadcast; 0 where nothing is.

    Raises:
      InputError: the module has a parameter that is neither kernel nor bias, so that
        nobody knows what it does to y.
    """
    known = (call.kernel, call.kernel + SUFFIX, call.bias)
    for name in owner.parameters:
        if name not in known:
            raise InputError(
                f"{owner.path or owner.kind}: DoRA scales x K and not what is added to "
                f"it, and {name!r} is neither kernel nor bias to the handler of "
                f"{owner.kind}: name it in Call(bias=), or adapt without DoRA"
            )
    if call.bias is None:
        return 0.0
    shape = [
        size if label in call.contraction.kernel else 1
        for label, size in zip(call.contraction.y, y.shape, strict=True)
    ]
    return owner.parameters[call.bias].astype(y.dtype).reshape(shape)
