"""Whether a checkpoint's files hold the model its config describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import names
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.families.registry import family_of
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.tensors import StoredTensor, open_checkpoint


def check_checkpoint(
    folder: str | Path, config: ModelConfig, *, new_head: bool = False
) -> None:
    """Check from the files' headers that they hold a model of this config.

    The head of an encoder may be missing.

    Args:
      folder: of the checkpoint.
      config: of the model, from `read_config`.
      new_head: as in `load_params`.

    Raises:
      InputError: as `load_params`.
    """
    wanted = paths.flatten(names.abstract_params(config))
    stored = open_canonical(folder, config, new_head)
    fresh = missing_head(wanted, stored, config)
    params_to_read(Path(folder), stored, wanted, fresh, config)


def absent_head(
    folder: str | Path, config: ModelConfig, *, new_head: bool = False
) -> tuple[str, ...]:
    """Return the paths of the head's parameters that a checkpoint lacks.

    Args:
      folder: of the checkpoint; only the headers of its files are read.
      config: of the model, from `read_config`.
      new_head: as in `load_params`.

    Raises:
      InputError: if a file is missing, corrupt or truncated.
    """
    wanted = paths.flatten(names.abstract_params(config))
    return tuple(missing_head(wanted, open_canonical(folder, config, new_head), config))


def open_canonical(
    folder: str | Path, config: ModelConfig, new_head: bool
) -> dict[str, StoredTensor]:
    """Describe a checkpoint's tensors under the names of `names.tensor_names`.

    Args:
      folder: of the checkpoint.
      config: of the model.
      new_head: leave the last layer of an encoder's head out.

    Raises:
      InputError: if a file is missing, corrupt or truncated.
    """
    family = family_of(config)
    stored = open_checkpoint(folder, family.buffers)
    found = names.canonical_names(stored, config.model_type)
    left_out = f"{family.readout}." if new_head else None
    return {
        name: stored[theirs]
        for name, theirs in found.items()
        if left_out is None or not name.startswith(left_out)
    }


def missing_head(
    wanted: Mapping[str, Any], stored: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, Any]:
    """Return those of the head's parameters whose tensors are not stored.

    Args:
      wanted: {path: parameter} of the whole model.
      stored: {tensor: its description}.
      config: of the model.
    """
    return {
        path: wanted[path]
        for path in names.head_paths(wanted, config.model_type)
        if not {*names.tensor_names(path, (), config.model_type)} & stored.keys()
    }


def params_to_read(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, Any],
    fresh: Mapping[str, Any],
    config: ModelConfig,
) -> dict[str, Any]:
    """Return {path: parameter} of those to read, all of which the files hold.

    Args:
      folder: of the checkpoint, for messages.
      stored: {tensor: its description}.
      wanted: {path: parameter} of the whole model.
      fresh: those of them that are initialized instead.
      config: of the model.

    Raises:
      InputError: if tensors are missing, unknown or of another shape.
    """
    read = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    shapes = names.tensor_shapes(read, config.model_type)
    _check_tensors(folder, stored, shapes, family_of(config).unused)
    return read


def _check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    unused: str,
) -> None:
    """Compare names and shapes with those that the config asks for."""
    spare = re.compile(unused)
    unknown = {name for name in stored if not spare.fullmatch(name)} - wanted.keys()
    missing = wanted.keys() - stored.keys()
    wrong = sorted(
        name
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name]
    )
    if missing:
        fault = f"{folder} lacks {_some(missing)}, which config.json asks for"
    elif unknown:
        fault = f"{folder} holds {_some(unknown)}, which config.json does not ask for"
    elif wrong:
        found = stored[wrong[0]]
        fault = (
            f"{found.file} holds {_some(wrong)} with shape {found.shape}, but "
            f"config.json asks for {wanted[wrong[0]]}"
        )
    else:
        return
    raise InputError(f"{fault}: fetch weights and config of one model")


def check_tied(stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Refuse a stored head that differs from the embedding it is tied to.

    Args:
      stored: {tensor: its description}.
      config: of the model.

    Raises:
      InputError: if it differs.
    """
    if not getattr(config, "tie_word_embeddings", False) or HEAD not in stored:
        return
    head, table = stored[HEAD], stored[EMBEDDING]
    same = head.shape == table.shape and all(
        np.array_equal(head.read(part), table.read(part))
        for part in _blocks(head.shape[0])
    )
    if not same:
        raise InputError(
            f"{head.file} holds {head.name!r}, which differs from {table.name!r} "
            "although tie_word_embeddings is true: set that to false in config.json "
            "if the head was trained, or remove the tensor"
        )


def _blocks(rows: int, size: int = 4096) -> list[tuple[slice]]:
    """Return slices of at most `size` rows that cover all rows."""
    return [(slice(n, min(n + size, rows)),) for n in range(0, rows, size)]


def _some(tensors: Collection[str]) -> str:
    """Name the first of `tensors` and count the others."""
    others = len(tensors) - 1
    return f"tensor {min(tensors)!r}" + (f" (and {others} more)" if others else "")
