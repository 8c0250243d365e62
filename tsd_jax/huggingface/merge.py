"""Write a Hugging Face checkpoint with an adapter merged into its weights.

The base is read tensor by tensor and written file by file, as it is sharded: one shard
is in memory at a time, as arrays and, while it is written, as bytes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tsd_jax.core.adapter import Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.factors import (
    Factors,
    ModuleName,
    module_factors,
    relative,
    require_finite,
    total,
)
from tsd_jax.huggingface.full_tensors import FullTensor, full_tensors
from tsd_jax.huggingface.vocabulary import (
    EMBEDDING,
    HEAD,
    copy_tokenizer,
    grown_vocabulary,
    replaced,
    with_copy,
)
from tsd_jax.storage.files import open_tensors, read_json, read_tensor, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What lies beside the weights and belongs to the model: settings, tokenizer, licence.
BESIDE = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedExport:
    """Say what was written.

    Attributes:
      errors: {torch module: ||rounding||_F / ||dK||_F}: how much of what was added the
        rounding to the stored type took, or added to it; 0 in float32.
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

    With DoRA its rows are scaled to their magnitudes before they are rounded. Parts
    trained whole take their tensors' places; rows past the base's vocabulary grow it.
    Same files and index as the base's, with config.json, generation_config.json,
    tokenizer and licence beside them. The folder appears when all of it is written.

    Args:
      folder: new, or empty.
      trainable: on this host.
      directions: {kernel path: Directions}.
      module_name: (path, layer of a stacked leaf or None) -> name of the torch
        module; a kernel's `weight` is (out, in).
      base_folder: the base in Hugging Face format.
      dtype: of all float weights; by default each keeps its own. A small dK drowns in
        bfloat16: see the errors returned, and logged where they exceed 1 %.
      tokenizer_folder: holds the tokenizer of a vocabulary that has grown.

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
        whole=full_tensors(trainable.full, module_name),
        tokenizer_folder=tokenizer_folder,
    )


def merge_factors(
    folder: str | Path,
    factors: Mapping[str, Factors],
    *,
    base_folder: str | Path,
    dtype: DTypeLike | None = None,
    whole: Mapping[str, FullTensor] = MappingProxyType({}),
    tokenizer_folder: str | Path | None = None,
) -> MergedExport:
    """Merge {torch module: factors} and {tensor: `whole`}; see `to_merged`."""
    folder, base = Path(folder), Path(base_folder)
    target = None if dtype is None else jnp.dtype(dtype)
    if target is not None and not jnp.issubdtype(target, jnp.floating):
        raise InputError(f"dtype {target} cannot hold weights: name a float type")
    check_folders(folder, base)
    config = read_json(base / "config.json")
    wanted = {f"{name}.weight": (name, pair) for name, pair in factors.items()}
    files = _files(base)
    shapes = _shapes(files)
    _check_base(base, config, shapes, wanted)
    tied = bool(config.get("tie_word_embeddings"))
    whole = with_copy(whole, {*shapes}, tied=tied)
    size = grown_vocabulary(whole, shapes, base)
    if size is not None:
        config = {**config, "vocab_size": size}
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _copy_beside(base, part, config, target)
        if size is not None and tokenizer_folder is not None:
            copy_tokenizer(Path(tokenizer_folder), part)
        report = _Report()
        changes = {**wanted, **whole}
        sizes = [_write_shard(file, part, changes, target, report) for file in files]
        if (base / INDEX).is_file() and not (base / SINGLE).is_file():
            _write_index(base / INDEX, part, sum(sizes))
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder} ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report.export()


class _Report:
    """Gather what rounding did to each module."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[float, float]] = {}
        self.dtypes: set[str] = set()

    def add(self, name: str, lost: float, norm: float, dtype: np.dtype) -> None:
        self.pairs[name] = (lost, norm)
        self.dtypes.add(str(dtype))

    def export(self) -> MergedExport:
        errors = {name: relative(*pair) for name, pair in self.pairs.items()}
        export = MergedExport(errors, total(self.pairs), tuple(sorted(self.dtypes)))
        if export.error > 0.01:
            _log.warning(
                "rounding to %s changed what was merged by %.1f %% (of its norm); "
                "float32 keeps it",
                ", ".join(export.dtypes),
                100 * export.error,
            )
        return export


def check_folders(folder: Path, base: Path) -> None:
    """Refuse to write over anything."""
    if not base.is_dir():
        raise InputError(f"base folder {base} does not exist: give the base model's")
    if folder.resolve() == base.resolve():
        raise InputError(f"{folder} is the base's own folder: give a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: give a new or empty folder")
    for place in folder.parents:
        if place.exists() and not place.is_dir():
            raise InputError(f"{folder}: {place} is a file; give a folder")


def _files(base: Path) -> list[Path]:
    """List the base's files of weights."""
    if (base / SINGLE).is_file():
        return [base / SINGLE]
    if not (base / INDEX).is_file():
        raise InputError(f"{base} holds neither {SINGLE} nor {INDEX}: fetch one")
    listed = read_json(base / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(name, str) and name and Path(name).name == name
        for name in listed.values()
    ):
        raise InputError(f'{base / INDEX} has no "weight_map" of file names')
    return [base / name for name in sorted({*listed.values()})]


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all weights from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  it is no mapping
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def _check_base(
    base: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[str, Factors]],
) -> None:
    """See that every dK has its own float weight to go into."""
    if config.get("quantization_config"):
        raise InputError(f"{base} is quantized: merge into its unquantized original")
    for name, (module, pair) in wanted.items():
        if config.get("tie_word_embeddings") and name in (EMBEDDING, HEAD):
            raise InputError(
                f"{module} shares its weight with another module (tied embeddings): "
                "a change of one alone has no place in this checkpoint"
            )
        if name not in shapes:
            raise InputError(f"{base} has no tensor {name!r}: it is another base")
        shape = (pair.up.shape[1], pair.down.shape[0])
        if shapes[name] != shape:
            raise InputError(
                f"{base} has {name!r} of shape {shapes[name]}, and the adapter is made "
                f"for {shape}: it is another base"
            )
        require_finite(pair)


def _copy_beside(
    base: Path, part: Path, config: Mapping[str, Any], target: Any
) -> None:
    """Copy what lies beside the weights; `config`, and their type, as they are now."""
    found = {file for pattern in BESIDE for file in base.glob(pattern)}
    for file in sorted(found):
        if file.is_file() and file.name not in (INDEX, "adapter_config.json"):
            shutil.copyfile(file, part / file.name)
    if target is not None:
        keys = {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}
        config = {**config, **dict.fromkeys(keys, str(target))}
    if config != read_json(base / "config.json"):
        write_json(part / "config.json", config)


def _write_shard(
    file: Path,
    part: Path,
    wanted: Mapping[str, tuple[str, Factors] | FullTensor],
    target: np.dtype | None,
    report: _Report,
) -> int:
    """Write one file of the base with what is merged into it; give its size."""
    tensors = {}
    with open_tensors(file) as opened:
        metadata = opened.metadata() or {"format": "pt"}
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            stored = read_tensor(opened, name, file)
            floating = jnp.issubdtype(stored.dtype, jnp.floating)
            dtype = target if target is not None and floating else stored.dtype
            if name in wanted:
                if not floating:
                    raise InputError(f"{file}: {name!r} is of type {stored.dtype}")
                tensors[name] = _changed(stored, wanted[name], dtype, report)
            else:
                tensors[name] = stored.astype(dtype, copy=False)
    written = part / file.name
    save_file(tensors, written, metadata)
    shutil.copymode(part / "config.json", written)  # else only the owner could read
    return sum(tensor.nbytes for tensor in tensors.values())


def _changed(
    stored: np.ndarray,
    wanted: tuple[str, Factors] | FullTensor,
    dtype: np.dtype,
    report: _Report,
) -> np.ndarray:
    """Add one dK to its weight, or replace it, and note what rounding does to it."""
    if isinstance(wanted, FullTensor):
        name, exact = wanted.name.removesuffix(".weight"), replaced(stored, wanted)
        before = np.zeros_like(exact)
        before[: len(stored)] = stored
    else:
        name, pair = wanted
        before = stored.astype(np.promote_types(stored.dtype, np.float32))
        exact = pair.applied(before)
    change = exact - before
    merged = exact.astype(dtype)
    lost = merged.astype(exact.dtype) - exact
    report.add(
        name, float(np.linalg.norm(lost)), float(np.linalg.norm(change)), merged.dtype
    )
    return merged


def _write_index(index: Path, part: Path, size: int) -> None:
    """Write the base's index with the size the weights have now."""
    content = read_json(index)
    content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
    text = json.dumps(content, indent=2) + "\n"
    (part / index.name).write_text(text, encoding="utf-8")
