"""Weights from a checkpoint straight to where they are needed, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization, Quantized
from tsd_jax.core.types import Progress
from tsd_jax.huggingface import names
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.device_loader import READERS, DeviceLoader, Slices, read_ahead
from tsd_jax.huggingface.families.decoders import FAMILIES
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.tensors import SINGLE_FILE, StoredTensor, open_tensors
from tsd_jax.models.encoder_config import EncoderConfig

_ROWS = 64
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    scan_layers: bool = True,
    shardings: Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
    head_key: jax.Array | None = None,
    new_head: bool = False,
    progress: Progress | None = None,
    readers: int = READERS,
) -> dict[str, Any]:
    """Load a checkpoint's weights, each device's part straight from the file.

    Every name, shape and dtype is checked in the files' headers before a weight is
    read. Several threads read ahead, 256 MiB at most or one matrix; stacked kernels
    fill on their devices, a matrix at a time, and are never whole on the host.

    Args:
      folder: holds `model.safetensors`, or an index and its shards.
      config: of the model, from `read_config`.
      dtype: to cast to on the way; by default the stored one.
      scan_layers: stack the layers, as `Decoder(scan_layers=True)` wants them.
      shardings: a NamedSharding for every parameter, in the parameters' tree; by
        default whole arrays on the default device.
      quantization: of the kernels of linear layers, on their devices, a matrix at a
        time, from the stored type; `dtype` is then that of their use.
      head_key: a random key for the head of an encoder whose files have none
        (`absent_head`): kernels N(0, initializer_range²), biases 0. Where the files
        have one, it is read.
      new_head: start the last layer of the head afresh whatever the files have.
      progress: called as weights are placed.
      readers: threads that read.

    Returns:
      The tree of parameters.

    Raises:
      InputError: if a file is missing, corrupt or truncated, if a tensor is missing,
        unknown or has the wrong shape, if `shardings` has another structure, or if
        tiles do not divide a kernel.
    """
    stored = _open(folder, config, new_head)
    wanted = names.flatten(names.abstract_params(config, scan_layers=scan_layers))
    fresh = {} if head_key is None else _absent_head(wanted, stored, config)
    read = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    shapes = names.tensor_shapes(read, config.model_type)
    _check_tensors(Path(folder), stored, shapes, FAMILIES[config.model_type].unused)
    if getattr(config, "tie_word_embeddings", False) and _HEAD in stored:
        _check_tied(stored[_HEAD], stored[_TABLE])
    places = dict.fromkeys(wanted) if shardings is None else names.flatten(shardings)
    odd = places.keys() ^ wanted.keys()
    if odd:
        raise InputError(
            f"shardings and parameters differ at {min(odd)!r}: give one for each"
        )
    kind = FAMILIES[config.model_type].kind
    jobs = []
    for path, leaf in fresh.items():
        made = _start_head(path, leaf.shape, config, head_key, dtype)
        placing = DeviceLoader(leaf.shape, made.dtype, 0, places[path])
        jobs += [_job(path, placing, step, made.__getitem__) for step in placing.steps]
    for path, leaf in read.items():
        owners = names.tensor_names(path, leaf.shape, config.model_type)
        tensors = [stored[name] for name in owners]
        target = _target(tensors, dtype)
        depth = names.stacked_axes(path)
        encode = None
        if quantization is not None and re.fullmatch(kind.linear, path):
            quantization.check(path, leaf.shape)
            encode = Quantize(quantization, target)
            target = _target(tensors, None)
        placing = DeviceLoader(leaf.shape, target, depth, places[path], encode)
        part = _reader(path, leaf.shape, tensors, target)
        jobs += [_job(path, placing, step, part) for step in placing.steps]
    return traverse_util.unflatten_dict(_placed(jobs, progress, readers), sep="/")


@dataclass(frozen=True)
class Quantize:
    """Quantize matrices for use in `dtype`; hashable, for jit."""

    quantization: Quantization
    dtype: np.dtype

    def __call__(self, matrices: jax.Array) -> Quantized:
        """Quantize (..., in, out)."""
        return self.quantization.quantize(matrices, self.dtype)


Step = tuple[str, DeviceLoader, tuple[int, ...]]


def _job(
    path: str, placing: DeviceLoader, step: tuple[int, ...], read: Callable
) -> tuple[Step, int, Callable[[], list[np.ndarray]]]:
    """Say what one step brings, in how many bytes, and how it is read."""
    parts = placing.indices(step)
    return (path, placing, step), placing.bytes, lambda: [read(part) for part in parts]


def _placed(jobs: list[Any], progress: Progress | None, readers: int) -> dict[str, Any]:
    """Bring all steps to the devices, in order."""
    total = sum(size for _, size, _ in jobs)
    params, done = {}, 0
    for (path, placing, step), blocks in read_ahead(jobs, readers=readers):
        placing.put(step, blocks)
        done += placing.bytes
        if step == placing.steps[-1]:
            params[path] = placing.finish()
        if progress is not None:
            progress(done, total)
    return params


def check_checkpoint(
    folder: str | Path, config: ModelConfig, *, new_head: bool = False
) -> None:
    """See from the files' headers that they hold a model of this config.

    A head that they lack, or shall not be read (`new_head`), is none of it.

    Raises:
      InputError: as `load_params`.
    """
    wanted = names.flatten(names.abstract_params(config))
    stored = _open(folder, config, new_head)
    fresh = _absent_head(wanted, stored, config)
    read = {path: leaf for path, leaf in wanted.items() if path not in fresh}
    shapes = names.tensor_shapes(read, config.model_type)
    _check_tensors(Path(folder), stored, shapes, FAMILIES[config.model_type].unused)


def absent_head(
    folder: str | Path, config: ModelConfig, *, new_head: bool = False
) -> tuple[str, ...]:
    """Return the parameters of the head that a checkpoint lacks, from its headers.

    Args:
      folder, config, new_head: as of `load_params`.

    Raises:
      InputError: if a file is missing, corrupt or truncated.
    """
    wanted = names.flatten(names.abstract_params(config))
    return tuple(_absent_head(wanted, _open(folder, config, new_head), config))


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors as stock transformers loads them.

    Args:
      folder: made if it does not exist; the two files are replaced whole.
      config: of the model.
      params: the tree of parameters, scanned or not, without adapters.
      dtype: to round the weights to; by default the parameters' own.
      extra: more entries of config.json, such as `eos_token_id`.

    Raises:
      InputError: if `params` is not the tree of a model with this config.
    """
    tensors = names.to_huggingface(params, config)
    if dtype is not None:
        tensors = {
            name: each.astype(jnp.dtype(dtype)) for name, each in tensors.items()
        }
    stored = str(next(iter(tensors.values())).dtype)
    text = json.dumps({**config_json(config, stored), **(extra or {})}, indent=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / SINGLE_FILE, folder / "config.json"
    # Under other names first: an interrupted write leaves the old files whole.
    new_weights, new_settings = (Path(f"{file}.new") for file in (weights, settings))
    new_settings.write_text(text + "\n", encoding="utf-8")
    save_file(tensors, new_weights, metadata={"format": "pt"})
    shutil.copymode(new_settings, new_weights)  # safetensors lets only the owner read
    os.replace(new_weights, weights)
    os.replace(new_settings, settings)


def _open(
    folder: str | Path, config: ModelConfig, new_head: bool
) -> dict[str, StoredTensor]:
    """Describe a checkpoint's tensors, by the names they have here."""
    stored = open_tensors(folder, FAMILIES[config.model_type].buffers)
    found = names.canonical_names(stored, config.model_type)
    left_out = f"{FAMILIES[config.model_type].readout}." if new_head else None
    return {
        name: stored[theirs]
        for name, theirs in found.items()
        if left_out is None or not name.startswith(left_out)
    }


def _absent_head(
    wanted: Mapping[str, Any], stored: Mapping[str, StoredTensor], config: ModelConfig
) -> dict[str, Any]:
    """Return those of the head's parameters whose tensors are not there."""
    return {
        path: wanted[path]
        for path in names.head_paths(wanted, config.model_type)
        if not {*names.tensor_names(path, (), config.model_type)} & stored.keys()
    }


def _start_head(
    path: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    key: jax.Array | None,
    dtype: DTypeLike | None,
) -> np.ndarray:
    """Start a parameter of the head."""
    assert key is not None
    assert isinstance(config, EncoderConfig)
    started = np.zeros(shape, np.float32)
    if names.is_transposed(path):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        started = config.initializer_range * jax.random.normal(own, shape)
    return np.asarray(started).astype(jnp.dtype(dtype or jnp.float32))


def _check_tensors(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    unused: str,
) -> None:
    """Compare names and shapes with those the config asks for."""
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


def _check_tied(head: StoredTensor, table: StoredTensor) -> None:
    """Refuse a head that is no copy of the embeddings it should be tied to."""
    same = head.shape == table.shape and all(
        np.array_equal(head.read(part), table.read(part))
        for part in _blocks(head.shape[0])
    )
    if not same:
        raise InputError(
            f"{head.file} holds {head.name!r}, and it is no copy of {table.name!r}, "
            "though tie_word_embeddings is true: set that to false in config.json if "
            "the head was trained, or take the tensor out"
        )


def _blocks(rows: int, size: int = 4096) -> list[Slices]:
    """Cut so many rows into slices of at most `size`."""
    return [(slice(n, min(n + size, rows)),) for n in range(0, rows, size)]


def _some(tensors: Collection[str]) -> str:
    """Name the first of `tensors` and count the others."""
    others = len(tensors) - 1
    return f"tensor {min(tensors)!r}" + (f" (and {others} more)" if others else "")


def _target(tensors: Collection[StoredTensor], dtype: DTypeLike | None) -> np.dtype:
    """Return the type a parameter arrives in."""
    stored = jnp.result_type(*(tensor.dtype for tensor in tensors))
    return np.dtype(jax.dtypes.canonicalize_dtype(stored if dtype is None else dtype))


def _reader(
    path: str, shape: tuple[int, ...], tensors: list[StoredTensor], target: np.dtype
) -> Callable[[Slices], np.ndarray]:
    """Make the function that reads any part of a parameter from its tensors."""
    depth = names.stacked_axes(path)
    numbers = np.arange(len(tensors)).reshape(shape[:depth])

    def read(index: Slices) -> np.ndarray:
        extents = [len(range(n)[part]) for n, part in zip(shape, index, strict=True)]
        block = np.empty(extents, target)
        matrices, inner = block.reshape(-1, *extents[depth:]), index[depth:]
        chosen = numbers[index[:depth]].ravel()
        for matrix, number in zip(matrices, chosen, strict=True):
            if names.is_transposed(path):
                _copy(matrix.T, tensors[number].read(inner[::-1]))
            else:
                _copy(matrix, tensors[number].read(inner))
        return block

    return read


def _copy(target: np.ndarray, stored: np.ndarray) -> None:
    """Copy and cast, some rows at a time, which is many times faster transposed."""
    if target.dtype == stored.dtype:  # as bits: NumPy then lets other threads run
        bits = np.dtype(f"u{target.itemsize}")
        target, stored = target.view(bits), stored.view(bits)
    for row in range(0, len(stored), _ROWS):
        target[row : row + _ROWS] = stored[row : row + _ROWS]
