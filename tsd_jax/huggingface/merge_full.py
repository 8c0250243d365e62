"""Full parameters merged into a checkpoint, whose vocabulary may grow by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.names import EMBEDDING, HEAD


def grown_vocabulary(
    full: Mapping[str, FullTensor], shapes: Mapping[str, tuple[int, ...]], base: Path
) -> int | None:
    """Return the new size of the vocabulary; None where it stays the same.

    Args:
      full: {tensor: its trained values}.
      shapes: of those tensors in the base, and of its embedding and head.
      base: its folder, for messages.

    Raises:
      InputError: the base lacks a tensor or has it in another shape, or only one of
        embedding and head has grown.
    """
    sizes = {name: shapes[name][0] for name in (EMBEDDING, HEAD) if name in shapes}
    for name, each in full.items():
        if name not in shapes:
            raise InputError(
                f"{base} has no tensor {name!r}: give the base that was trained on"
            )
        size = _fitting_size(each, shapes[name])
        if size is None:
            raise InputError(
                f"{base} has {name!r} of shape {shapes[name]}, which does not fit the "
                f"trained {_description(each)}: give the base that was trained on"
            )
        if name in sizes:
            sizes[name] = size
    if all(shapes[name][0] == size for name, size in sizes.items()):
        return None
    if len({*sizes.values()}) > 1:
        raise InputError(
            f"the vocabulary would have {' and '.join(map(str, sizes.values()))} rows "
            f"in {' and '.join(sizes)}: train new rows of both"
        )
    return max(sizes.values())


def replaced(stored: np.ndarray, each: FullTensor) -> np.ndarray:
    """Return a tensor with its trained values and new rows, in float32 or wider.

    Args:
      stored: the base's tensor.
      each: its trained values.
    """
    exact = stored.astype(np.promote_types(stored.dtype, np.float32))
    if each.rows is None:
        return each.value.astype(exact.dtype)
    size = max(len(exact), max(each.rows) + 1)
    grown = np.zeros((size, *exact.shape[1:]), exact.dtype)
    grown[: len(exact)] = exact
    grown[list(each.rows)] = each.value
    return grown


def _fitting_size(each: FullTensor, shape: tuple[int, ...]) -> int | None:
    """Return the length of the first axis afterwards; None if the shapes do not fit."""
    if each.rows is None:
        grown = each.name in (EMBEDDING, HEAD) and len(each.value) > shape[0]
        same = each.value.shape == (len(each.value) if grown else shape[0], *shape[1:])
        return len(each.value) if same else None
    size = max(shape[0], max(each.rows) + 1)
    complete = {*range(shape[0], size)} <= {*each.rows}
    may = size == shape[0] or each.name in (EMBEDDING, HEAD)
    return size if complete and may and each.value.shape[1:] == shape[1:] else None


def _description(each: FullTensor) -> str:
    if each.rows is None:
        return f"shape {each.value.shape}"
    return f"rows {min(each.rows)} to {max(each.rows)} of width {each.value.shape[1:]}"
