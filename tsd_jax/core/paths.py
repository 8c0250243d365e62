"""Parameter trees as flat dicts of "/"-joined paths, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import core, traverse_util

from tsd_jax.core.errors import InputError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict (or FrozenDict) to {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(core.unfreeze(dict(tree)), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest {"a/b/c": leaf} again; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def update(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `tree` with the leaves at these paths added or replaced."""
    return unflatten({**flatten(tree), **leaves})


def select(tree: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """Return {path: leaf} of `paths`, in their order.

    Raises:
      InputError: a path is not in the tree.
    """
    flat = flatten(tree)
    for path in paths:
        if path not in flat:
            raise InputError(
                f"the parameters have no {path!r}: "
                "they are not the tree the spec was made from"
            )
    return {path: flat[path] for path in paths}
