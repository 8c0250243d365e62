"""Parameter trees as flat dicts of "/"-joined paths, and the reverse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flax import core, traverse_util
from flax.core import meta

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


def is_box(leaf: Any) -> bool:
    """Return whether a leaf is Flax metadata around an array, as `nn.Partitioned` is.

    Args:
      leaf: of a parameter tree. A quantized kernel is no box: it has a shape itself.
    """
    return isinstance(leaf, meta.AxisMetadata) and not hasattr(leaf, "shape")


def unboxed(leaf: Any) -> Any:
    """Return what is in a box, and any other leaf as it is.

    Args:
      leaf: of a parameter tree.
    """
    return leaf.unbox() if is_box(leaf) else leaf


def update(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> Any:
    """Return a copy of a tree with some leaves added or replaced.

    Empty branches, FrozenDicts and boxes stay what they are.

    Args:
      tree: the nested dict, which is not changed.
      leaves: {path: new leaf}.
    """
    rest = dict(leaves)

    def rebuilt(node: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        new = {}
        for name, leaf in node.items():
            path = prefix + name
            if isinstance(leaf, Mapping):
                new[name] = rebuilt(leaf, path + "/")
            else:
                new[name] = _in_place_of(leaf, rest.pop(path)) if path in rest else leaf
        own = [p for p in rest if p.startswith(prefix) and "/" not in p[len(prefix) :]]
        new |= {path[len(prefix) :]: rest.pop(path) for path in own}
        return core.FrozenDict(new) if isinstance(node, core.FrozenDict) else new

    new = rebuilt(tree, "")
    return unflatten({**flatten(new), **rest}) if rest else new


def _in_place_of(old: Any, new: Any) -> Any:
    """Box a new leaf as the old one is."""
    boxed = is_box(old) and not isinstance(new, meta.AxisMetadata)
    return old.replace_boxed(new) if boxed else new


def select(tree: Mapping[str, Any], paths: tuple[str, ...]) -> dict[str, Any]:
    """Return {path: leaf} of some paths, in their order and without boxes.

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
    return {path: unboxed(flat[path]) for path in paths}


def check_pattern(pattern: str, *, where: str) -> None:
    """Raise InputError unless a pattern over paths is a regular expression.

    Args:
      pattern: the pattern.
      where: what the message begins with, such as the rule at fault.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{where}: not a regular expression: {error}") from None
