"""Copies of the base's weights that PEFT saves beside an adapter.

It saves them of embedding and head where one of them has LoRA, or the vocabulary was
resized. On loading they replace the base's own values, so that what differs from those
belongs to what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.full_params import full_of, head_follows, is_full
from tsd_jax.huggingface.peft.names import PREFIX

ReadTensor = Callable[[str], np.ndarray | None]
"""Name of a torch tensor -> the base's values of it, None if it has none."""

_WORDS = ".word_embeddings.weight"
_WRAPPED = re.compile(
    r"(.+?)\.(?:token_adapter\.base_layer|base_layer|original_module)"
)


def base_copies(files: AdapterFiles) -> dict[str, np.ndarray]:
    """Return {torch tensor: the copy of its base's values}; most adapters have none.

    Args:
      files: of the adapter.

    Raises:
      InputError: two copies of one tensor differ.
    """
    copies: dict[str, np.ndarray] = {}
    for name, value in files.tensors.items():
        tensor = copied_tensor(name)
        if tensor is None or is_full(name, files.config):
            continue
        if not np.array_equal(copies.setdefault(tensor, value), value):
            raise InputError(
                f"{files.weights} holds {tensor} twice, with different values: save "
                "the adapter again"
            )
    return copies


def copied_tensor(name: str) -> str | None:
    """Return the torch tensor that a tensor of the file may be a copy of, or None.

    Args:
      name: as in the file.
    """
    tensor = name.removeprefix(PREFIX)
    module, _, kind = tensor.rpartition(".")
    wrapped = _WRAPPED.fullmatch(module)
    if wrapped and kind in ("weight", "bias"):
        return f"{wrapped[1]}.{kind}"
    words = tensor.endswith(_WORDS)  # of an encoder
    return tensor if words or tensor in (EMBEDDING, HEAD) else None


def full_on_base(
    files: AdapterFiles, read: ReadTensor, *, tied: bool
) -> dict[str, FullTensor]:
    """Return {torch tensor: what the adapter has in place of the base's values}.

    Copies that equal the base are left out; of others, the rows that differ count.

    Args:
      files: of the adapter.
      read: the base's values; called for tensors with a copy.
      tied: whether the base's head is its embedding.

    Raises:
      InputError: a copy has another width than the base's tensor, or fewer rows.
    """
    full, copies = full_of(files), base_copies(files)
    follows = tied and EMBEDDING in full and HEAD not in full and head_follows(files)
    for name, copy in copies.items():
        trained = full.get(name)
        whole = trained is not None and trained.rows is None
        if whole or (follows and name == HEAD):
            continue
        rows = _different_rows(files, name, copy, read(name))
        if rows:
            full[name] = _with_rows(name, copy, rows, trained)
    return full


def _different_rows(
    files: AdapterFiles, name: str, copy: np.ndarray, stored: np.ndarray | None
) -> set[int]:
    """Return the rows of a copy that are not the base's."""
    fits = stored is not None and copy.shape[1:] == stored.shape[1:]
    if stored is None or not fits or len(copy) < len(stored):
        found = "nothing" if stored is None else stored.shape
        raise InputError(
            f"{files.weights} holds a copy of {name} of shape {copy.shape}, and the "
            f"base has {found}: give the base that was trained on"
        )
    both = copy[: len(stored)]
    same = both == stored.astype(copy.dtype)
    axes = tuple(range(1, copy.ndim))
    differ = np.flatnonzero(~same.all(axis=axes))
    return {*map(int, differ), *range(len(stored), len(copy))}


def _with_rows(
    name: str, copy: np.ndarray, rows: set[int], trained: FullTensor | None
) -> FullTensor:
    """Return the rows of a copy, and what was trained of them or others on top."""
    value = np.array(copy, np.float32)
    if trained is not None:
        value[list(trained.rows or ())] = trained.value
        rows = rows | {*(trained.rows or ())}
    kept = tuple(sorted(rows))
    module, _, tensor = name.rpartition(".")
    return FullTensor(module, tensor, value[list(kept)], kept)
