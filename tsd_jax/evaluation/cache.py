"""The collection "cache" of any model: made empty, read with, and moved between rows.

Which axis of an array counts rows, and which one slots, is found by asking for caches
of other sizes; nothing is computed for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Axes(NamedTuple):
    """The axes of one array of a cache; None where it has no such axis."""

    rows: int | None
    slots: int | None


def abstract_cache(
    apply_fn: Callable[..., Any], variables: Any, rows: int, slots: int
) -> Any:
    """Return the shapes of a cache.

    Args:
      apply_fn: of the model.
      variables: of the model, without a cache.
      rows: in a batch.
      slots: of each row.
    """
    call = functools.partial(apply_fn, decode=True, mutable=["cache"])
    tokens = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
    return jax.eval_shape(call, variables, tokens)[1]["cache"]


def empty_cache(
    apply_fn: Callable[..., Any], variables: Any, rows: int, slots: int
) -> Any:
    """Return an empty cache; the arguments are those of `abstract_cache`."""
    shapes = abstract_cache(apply_fn, variables, rows, slots)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def cache_axes(apply_fn: Callable[..., Any], variables: Any) -> list[Axes]:
    """Return the axes of every array of a cache, in the order of its leaves."""
    sizes = ((2, 2), (3, 2), (2, 3))
    found = [
        jax.tree.leaves(abstract_cache(apply_fn, variables, *size)) for size in sizes
    ]
    return [
        Axes(_changed(one, more_rows), _changed(one, more_slots))
        for one, more_rows, more_slots in zip(*found, strict=True)
    ]


def _changed(one: Any, other: Any) -> int | None:
    """Return the axis in which two shapes differ."""
    sizes = zip(one.shape, other.shape, strict=True)
    return next((axis for axis, (a, b) in enumerate(sizes) if a != b), None)


def read(
    apply_fn: Callable[..., Any],
    variables: Any,
    cache: Any,
    tokens: Array,
    mask: Array | None = None,
) -> tuple[Array, Any]:
    """Return the logits (B, T, V) of tokens (B, T), and the new cache."""
    given = {**variables, "cache": cache}
    logits, new = apply_fn(given, tokens, mask=mask, decode=True, mutable=["cache"])
    return logits, new["cache"]


def repeat_rows(cache: Any, axes: list[Axes], times: int) -> Any:
    """Return a cache in which every row stands `times` times, one after another."""

    def repeated(leaf: Array, axis: Axes) -> Array:
        return leaf if axis.rows is None else jnp.repeat(leaf, times, axis.rows)

    return _map(repeated, cache, axes)


def choose_rows(cache: Any, axes: list[Axes], chosen: Array, first: int) -> Any:
    """Return a cache whose rows are chosen within groups of rows.

    Args:
      cache: of B · K rows.
      axes: of `cache_axes`.
      chosen: the row of its group, below K, that takes each place, (B, K).
      first: slots before this one are the same in all rows of a group: they stay.
    """

    def moved(leaf: Array, axis: Axes) -> Array:
        if axis.rows is None:
            return leaf
        if axis.slots is None:
            return _choose(leaf, axis.rows, chosen)
        some = lax.slice_in_dim(leaf, first, leaf.shape[axis.slots], axis=axis.slots)
        some = _choose(some, axis.rows, chosen)
        return lax.dynamic_update_slice_in_dim(leaf, some, first, axis.slots)

    return _map(moved, cache, axes)


def _choose(leaf: Array, axis: int, chosen: Array) -> Array:
    """Choose along an axis of B · K rows; groups stay on their devices."""
    shape = leaf.shape
    grouped = leaf.reshape(*shape[:axis], *chosen.shape, *shape[axis + 1 :])
    take = functools.partial(jnp.take, axis=axis, mode="clip")
    taken = jax.vmap(take, in_axes=(axis, 0), out_axes=axis)(grouped, chosen)
    return taken.reshape(shape)


def _map(function: Callable[[Array, Axes], Array], cache: Any, axes: list[Axes]) -> Any:
    leaves, tree = jax.tree.flatten(cache)
    return tree.unflatten(map(function, leaves, axes))
