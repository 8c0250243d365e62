"""A checkpoint whose vocabulary grows, and what trained whole in it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The tensors that have a row for each token."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def with_copy(
    whole: Mapping[str, FullTensor], names: set[str], *, tied: bool
) -> dict[str, FullTensor]:
    """Let the copy that some checkpoints keep of a tied embedding follow it."""
    if tied and EMBEDDING in whole and HEAD in names:
        return {**whole, HEAD: whole[EMBEDDING]._replace(module="lm_head")}
    return dict(whole)


def grown_vocabulary(
    whole: Mapping[str, FullTensor], shapes: Mapping[str, tuple[int, ...]], base: Path
) -> int | None:
    """Return the size of the vocabulary after growing; None where it stays.

    Args:
      whole: {tensor: what trained whole}.
      shapes: of those tensors in the base, and of its embedding and head.
      base: its folder, for the messages.

    Raises:
      InputError: the base lacks a tensor or has it in another shape, or of embedding
        and head only one has grown.
    """
    sizes = {name: shapes[name][0] for name in (EMBEDDING, HEAD) if name in shapes}
    for name, each in whole.items():
        if name not in shapes:
            raise InputError(f"{base} has no tensor {name!r}: it is another base")
        size = _fitting_size(each, shapes[name])
        if size is None:
            raise InputError(
                f"{base} has {name!r} of shape {shapes[name]}, which does not fit what "
                f"was trained of it, {_told(each)}: it is another base"
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


def _fitting_size(each: FullTensor, shape: tuple[int, ...]) -> int | None:
    """Return the length of the first axis afterwards, if it fits."""
    if each.rows is None:
        grown = each.name in (EMBEDDING, HEAD) and len(each.value) > shape[0]
        same = each.value.shape == (len(each.value) if grown else shape[0], *shape[1:])
        return len(each.value) if same else None
    size = max(shape[0], max(each.rows) + 1)
    complete = {*range(shape[0], size)} <= {*each.rows}
    may = size == shape[0] or each.name in (EMBEDDING, HEAD)
    return size if complete and may and each.value.shape[1:] == shape[1:] else None


def _told(each: FullTensor) -> str:
    if each.rows is None:
        return f"shape {each.value.shape}"
    return f"rows {min(each.rows)} to {max(each.rows)} of width {each.value.shape[1:]}"


def replaced(stored: np.ndarray, each: FullTensor) -> np.ndarray:
    """Return a tensor with its trained values, float32 or wider, grown where they are."""
    exact = stored.astype(np.promote_types(stored.dtype, np.float32))
    if each.rows is None:
        return each.value.astype(exact.dtype)
    size = max(len(exact), max(each.rows) + 1)
    grown = np.zeros((size, *exact.shape[1:]), exact.dtype)
    grown[: len(exact)] = exact
    grown[list(each.rows)] = each.value
    return grown


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put one tokenizer's files in the place of another's."""
    for name in _TOKENIZER:
        (target / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def has_tokenizer(folder: Any) -> bool:
    """Return whether a tokenizer lies in a folder."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZER)
