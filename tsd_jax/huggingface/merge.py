"""Write a Hugging Face checkpoint with an adapter merged into its weights.

The base is read tensor by tensor and written file by file, as it is sharded: one shard
is in memory at a time, as arrays and, while it is written, as bytes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from tsd_jax.core.adapter import Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.casts import cast
from tsd_jax.huggingface.factors import (
    Factors,
    module_factors,
    relative,
    require_finite,
    total,
)
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.huggingface.full_tensors import FullTensor, full_tensors
from tsd_jax.huggingface.merge_full import grown_vocabulary
from tsd_jax.huggingface.merge_tied import (
    Change,
    TiedChanges,
    changes_of,
    is_tied,
    tied_changes,
)
from tsd_jax.huggingface.model_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_new_folder,
    copy_companions,
    copy_tokenizer,
    staged_folder,
)
from tsd_jax.huggingface.names import (
    EMBEDDING,
    HEAD,
    ModuleName,
    canonical_names,
)
from tsd_jax.huggingface.tensors import holds_floats, weight_files
from tsd_jax.storage.atomic import read_json, write_json
from tsd_jax.storage.tensors import open_tensors, read_header, read_tensor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedExport:
    """What was written, and what rounding did to it.

    Attributes:
      errors: {torch module: ||rounding||_F / ||dK||_F}, what rounding to the stored
        dtype did to the change, relative to it; 0 in float32.
      error: the same of all modules taken as one matrix.
      dtypes: of the merged weights, by name.
    """

    errors: Mapping[str, float]
    error: float
    dtypes: tuple[str, ...]


def to_merged(
    folder: str | Path,
    trainable: Trainable,
    directions: Mapping[str, Directions],
    module_name: ModuleName,
    *,
    base_folder: str | Path,
    dtype: DTypeLike | None = None,
    tokenizer_folder: str | Path | None = None,
) -> MergedExport:
    """Write the base's checkpoint with every dK added to its weight.

        W' = round(W + dK^T),  added in float32 and rounded once

    With DoRA its rows are scaled to their magnitudes before they are rounded. Full
    parameters replace their tensors; rows past the base's vocabulary enlarge it. The
    files are split as the base's, with config.json, generation_config.json, tokenizer
    and licence beside them. The folder appears when everything is written.

    Args:
      folder: new or empty.
      trainable: on this host.
      directions: {kernel path: Directions}.
      module_name: (path, index of a stacked leaf or None) -> name of the torch module.
      base_folder: the base in Hugging Face format.
      dtype: of all float weights; by default each keeps its own. bfloat16 rounds much
        of a small dK away: see the errors returned, and logged where they exceed 1 %.
      tokenizer_folder: has the tokenizer of a vocabulary that has grown.

    Raises:
      InputError: the folder is not empty or is the base's own; the base is damaged,
        quantized or lacks a weight; a weight is shared with another (tied), or has
        another shape.
    """
    factors = module_factors(trainable.adapters, directions, module_name)
    return merge_factors(
        folder,
        factors,
        base_folder=base_folder,
        dtype=dtype,
        full=full_tensors(trainable.full, module_name),
        tokenizer_folder=tokenizer_folder,
        head_follows=True,
    )


def merge_factors(
    folder: str | Path,
    factors: Mapping[str, Factors],
    *,
    base_folder: str | Path,
    dtype: DTypeLike | None = None,
    full: Mapping[str, FullTensor] = MappingProxyType({}),
    tokenizer_folder: str | Path | None = None,
    head_follows: bool,
) -> MergedExport:
    """Merge torch modules' factors into a base; see `to_merged`.

    Args:
      folder: new or empty.
      factors: {torch module: dK of it}.
      base_folder: as in `to_merged`.
      dtype: as in `to_merged`.
      full: {torch tensor: its trained values}.
      tokenizer_folder: as in `to_merged`.
      head_follows: whether a tied head has what is trained of the embedding alone. If
        not, and wherever the head trains apart, the checkpoint is no longer tied.

    Raises:
      InputError: as `to_merged`.
    """
    folder, base = Path(folder), Path(base_folder)
    target = None if dtype is None else jnp.dtype(dtype)
    if target is not None and not jnp.issubdtype(target, jnp.floating):
        raise InputError(f"dtype {target} cannot hold weights: give a float dtype")
    check_new_folder(folder, base)
    config = read_json(base / CONFIG_FILE)
    files = weight_files(base)
    stored = {
        name: each.shape for file in files for name, each in read_header(file).items()
    }
    canonical = _canonical(stored, config)
    shapes = {canonical[name]: shape for name, shape in stored.items()}
    changes, untied = TiedChanges(changes_of(factors, full), untied=False)
    if is_tied(config):
        changes, untied = tied_changes(changes, shapes, head_follows=head_follows)
    copied = {EMBEDDING: HEAD} if untied and HEAD not in shapes else {}
    shapes |= {new: shapes[old] for old, new in copied.items() if old in shapes}
    size = _check_base(base, config, shapes, changes)
    new = _updated(config, target, size, untied=untied)
    report = _Report()
    with staged_folder(folder) as part:
        copy_companions(base, part)
        if new != config:
            write_json(part / CONFIG_FILE, new)
        if size is not None and tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), part)
        writer = _ShardWriter(base, part, canonical, changes, copied, target, report)
        total_size = sum([writer.write(file) for file in files])
        if files != [base / WEIGHTS_FILE]:
            new_tensors = {
                copied[name]: old for old, name in canonical.items() if name in copied
            }
            _write_index(base / INDEX_FILE, part, total_size, new_tensors)
    return report.export()


class _Report:
    """What rounding did to each module."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[float, float]] = {}
        self.dtypes: set[str] = set()

    def add(
        self, name: str, before: np.ndarray, exact: np.ndarray, merged: np.ndarray
    ) -> None:
        """Note one module's weight before, after, and as it is stored."""
        lost = merged.astype(exact.dtype) - exact
        pair = float(np.linalg.norm(lost)), float(np.linalg.norm(exact - before))
        self.pairs[name] = pair
        self.dtypes.add(str(merged.dtype))

    def export(self) -> MergedExport:
        """Return the errors, logging them where they are large."""
        errors = {name: relative(*pair) for name, pair in self.pairs.items()}
        export = MergedExport(errors, total(self.pairs), tuple(sorted(self.dtypes)))
        if export.error > 0.01:
            _log.warning(
                "rounding to %s changed the merged deltas by %.1f %% of their norm; "
                "float32 keeps them",
                ", ".join(export.dtypes),
                100 * export.error,
            )
        return export


def _canonical(stored: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return {tensor in the files: its name with the family's prefix}."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        return {name: name for name in stored}
    return {old: name for name, old in canonical_names(stored, family).items()}


def _check_base(
    base: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    changes: Mapping[str, Change],
) -> int | None:
    """Check that the base has what is changed; return the size it grows to, if any."""
    if config.get("quantization_config") and not holds_floats(base):
        raise InputError(f"{base} is quantized: merge into its unquantized original")
    full = {name: each.full for name, each in changes.items() if each.full is not None}
    size = grown_vocabulary(full, shapes, base)
    for name, change in changes.items():
        if name not in shapes:
            raise InputError(
                f"{base} has no tensor {name!r}: give the base that was trained on"
            )
        pair = change.factors
        if pair is None:
            continue
        first, *rest = shapes[name]
        found = (first if change.full is None else size or first, *rest)
        shape = (pair.up.shape[1], pair.down.shape[0])
        if found != shape:
            raise InputError(
                f"{base} has {name!r} of shape {found}, but the adapter needs "
                f"{shape}: give the base that was trained on"
            )
        require_finite(pair, name)
    return size


def _updated(
    config: Mapping[str, Any],
    target: np.dtype | None,
    vocab_size: int | None,
    *,
    untied: bool,
) -> dict[str, Any]:
    """Return the content of config.json that describes the merged model."""
    new = {name: v for name, v in config.items() if name != "quantization_config"}
    if untied:
        new["tie_word_embeddings"] = False
    if vocab_size is not None:
        new["vocab_size"] = vocab_size
    if target is not None:
        keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
        new |= dict.fromkeys(keys, str(target))
    return new


@dataclass(frozen=True)
class _ShardWriter:
    """Writes the files of a base with the changes merged into them.

    Attributes:
      base: folder of the base.
      folder: to write into.
      canonical: {tensor in the files: its name with the family's prefix}.
      changes: {tensor: what is merged into it}.
      copied: {tensor of the base: name of a tensor that starts as its copy}.
      target: dtype of all float weights; None for their own.
      report: of the rounding.
    """

    base: Path
    folder: Path
    canonical: Mapping[str, str]
    changes: Mapping[str, Change]
    copied: Mapping[str, str]
    target: np.dtype | None
    report: _Report

    def write(self, file: Path) -> int:
        """Write one file of the base with its changes; return the weights' bytes."""
        tensors = {}
        with open_tensors(file) as opened:
            metadata = opened.metadata() or {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118  it is not a mapping
                stored = read_tensor(opened, name, file)
                floating = jnp.issubdtype(stored.dtype, jnp.floating)
                known = self.canonical[name]
                if known in self.changes and not floating:
                    raise InputError(
                        f"{file}: {name!r} is of dtype {stored.dtype}, not a float"
                    )
                tensors[name] = self._merged(known, stored) if floating else stored
                if known in self.copied:
                    new = self.copied[known]
                    tensors[new] = self._merged(new, stored)
        written = self.folder / file.relative_to(self.base)
        written.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, written, metadata)
        # safetensors lets only the owner read.
        shutil.copymode(self.folder / CONFIG_FILE, written)
        return sum(tensor.nbytes for tensor in tensors.values())

    def _merged(self, name: str, stored: np.ndarray) -> np.ndarray:
        """Return a float tensor with its change, if it has one, in the target dtype."""
        dtype = stored.dtype if self.target is None else self.target
        change = self.changes.get(name)
        if change is None:
            return stored if dtype == stored.dtype else cast(stored, dtype, name)
        exact = change.applied(stored)
        before = np.zeros_like(exact)
        before[: len(stored)] = stored
        merged = cast(exact, dtype, name)
        self.report.add(name.removesuffix(".weight"), before, exact, merged)
        return merged


def _write_index(
    index: Path, part: Path, size: int, new_tensors: Mapping[str, str]
) -> None:
    """Write the base's index with the new size, and {new tensor: one in its file}."""
    content = read_json(index)
    content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
    listed = content["weight_map"]
    listed |= {new: listed[old] for new, old in new_tensors.items()}
    write_json(part / index.name, content)
