"""What a PEFT adapter has in place of a model's own values, by the model's parameters.

Embedding and head are one matrix in a tied model: an adapter that trains them apart is
refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.names import (
    EMBEDDING,
    HEAD,
    ParamSlot,
    StackIndex,
    axis_indices,
    is_transposed,
)
from tsd_jax.huggingface.peft.base_copies import base_copies, full_on_base
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.full_params import full_of, head_follows


def full_tensors(
    files: AdapterFiles,
    tensor_paths: Mapping[str, ParamSlot] | None,
    params: Mapping[str, Any] | None,
) -> dict[str, FullTensor]:
    """Return what the adapter has in place of the base's values, by torch tensor.

    Args:
      files: of the adapter.
      tensor_paths: {torch tensor: (parameter path, index of its matrix or None)}.
      params: the base's tree, which only copies of the base's weights need.

    Raises:
      InputError: the copies are of another base, or something is needed and missing.
    """
    copies = base_copies(files)
    if not copies:
        return full_of(files)
    if params is None or tensor_paths is None:
        raise InputError(
            f"{files.weights} holds a copy of the base's {min(copies)}, to compare "
            "with the base: give tensor_paths and params, its parameter tree"
        )
    flat, slots = paths.flatten(params), tensor_paths

    def read(name: str) -> np.ndarray | None:
        path, index = slots.get(name) or slots.get(EMBEDDING) or ("", None)
        if path not in flat:
            return None
        value = np.asarray(flat[path])[axis_indices(index)]
        value = value.T if is_transposed(path) else value
        if len(value) < len(copies[name]):
            raise InputError(
                f"{files.weights} holds {name} with {len(copies[name])} rows, and the "
                f"model has {len(value)}: grow it first (huggingface.grown_config, "
                "huggingface.grow)"
            )
        return value

    return full_on_base(files, read, tied=HEAD not in slots)


def check_tied(
    files: AdapterFiles,
    full: Mapping[str, FullTensor],
    tensor_paths: Mapping[str, ParamSlot] | None,
) -> None:
    """Refuse an adapter that trains apart what the model has as one matrix.

    Args:
      files: of the adapter.
      full: of `full_tensors`.
      tensor_paths: {torch tensor: (parameter path, index of its matrix or None)}.

    Raises:
      InputError: it does.
    """
    if tensor_paths is None or HEAD in tensor_paths:
        return
    if HEAD in full and not _are_equal(full.get(EMBEDDING), full[HEAD]):
        raise tied_error(files.folder, HEAD)
    alone = EMBEDDING in full and HEAD not in full
    if alone and EMBEDDING in tensor_paths and not head_follows(files):
        raise tied_error(files.folder, EMBEDDING)


def _are_equal(one: FullTensor | None, other: FullTensor) -> bool:
    if one is None or one.rows != other.rows:
        return False
    return np.array_equal(one.value, other.value)


def tied_error(folder: Path, name: str) -> InputError:
    """Return the error for a tensor or module that trains apart from its tied one."""
    return InputError(
        f"{folder} trains {name} alone, but the model has head and embedding as one "
        "matrix (tie_word_embeddings): train it with PEFT's ensure_weight_tying=True, "
        "or export it --to merged, which gives the head a weight of its own"
    )


def slot(slots: Mapping[str, ParamSlot], name: str, fact: str, what: str) -> ParamSlot:
    """Return where a torch module or tensor is; `fact` and `what` are for errors."""
    if name not in slots:
        near = difflib.get_close_matches(name, slots, n=1, cutoff=0.0)
        raise InputError(
            f"{fact}, but the model has no such {what}; the nearest is "
            f"{', '.join(near) or 'none'}"
        )
    return slots[name]


def full_params(
    files: AdapterFiles,
    tensors: Mapping[str, FullTensor],
    tensor_paths: Mapping[str, ParamSlot] | None,
) -> dict[str, dict[StackIndex, FullTensor]]:
    """Return {parameter path: {index of its matrix: what the adapter has of it}}."""
    full: dict[str, dict[StackIndex, FullTensor]] = {}
    for name, tensor in tensors.items():
        fact = f"{files.folder} trains {name} in full"
        if tensor_paths is None:
            raise InputError(f"{fact}: give tensor_paths (huggingface.tensor_paths)")
        if name == HEAD and HEAD not in tensor_paths and EMBEDDING in tensors:
            continue  # one matrix with the embedding, and the same values
        path, index = slot(tensor_paths, name, fact, "tensor")
        full.setdefault(path, {})[index] = tensor
    return full
