"""Parameter trees as flat dicts of "/"-joined paths, and the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import core, traverse_util

from tsd_jax.core.errors import InputError


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested dict (or FrozenDict) as {"a/b/c": leaf}.

    Args:
      tree: the nested dict.
    """
    return traverse_util.flatten_dict(core.unfreeze(dict(tree)), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a/b/c": leaf} as a nested dict; the inverse of `flatten`.

    Args:
      flat: {path: leaf}.
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def update(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree with some leaves added or replaced.

    Args:
      tree: the nested dict, which is not changed.
      leaves: {path: new leaf}.
    """
    return unflatten({**flatten(tree), **leaves})


def select(tree: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """Return {path: leaf} of some paths, in their order.

    Args:
      tree: the nested dict.
      paths: which leaves.

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
