"""A checkpoint's weights, each device's part read straight from the files."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization, Quantized
from tsd_jax.core.types import Progress
from tsd_jax.huggingface import names
from tsd_jax.huggingface.casts import cast
from tsd_jax.huggingface.check import (
    check_tied,
    missing_head,
    open_canonical,
    params_to_read,
)
from tsd_jax.huggingface.device_loader import (
    READERS,
    DeviceLoader,
    Encode,
    Slices,
    read_ahead,
)
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.families.registry import family_of
from tsd_jax.huggingface.tensors import StoredTensor
from tsd_jax.models.encoder_config import EncoderConfig

_ROWS = 64


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
    """Load a checkpoint's weights onto their devices.

    Names, shapes and dtypes are checked in the files' headers before a weight is read.
    Threads read ahead, up to 256 MiB or one matrix. Stacked kernels are filled on their
    devices, a matrix at a time, and never exist as a whole on the host.

    Args:
      folder: holds `model.safetensors`, or an index and its shards.
      config: of the model, from `read_config`.
      dtype: to cast to on the way; by default the stored one.
      scan_layers: stack the layers, as `Decoder(scan_layers=True)` wants them.
      shardings: the tree of NamedShardings; by default all on the default device.
      quantization: of linear kernels, on their devices, from the stored dtype; `dtype`
        is then that of their use.
      head_key: a random key to initialize an encoder's head that the files lack.
      new_head: initialize the last layer of the head even if the files have it.
      progress: called with the bytes loaded so far, and in total.
      readers: number of reading threads.

    Raises:
      InputError: a file is missing, corrupt or truncated; a tensor is missing, unknown
        or has the wrong shape; a value is not finite, or is not in `dtype`;
        `shardings` has another structure; or tiles do not divide a kernel.
    """
    stored = open_canonical(folder, config, new_head)
    wanted = paths.flatten(names.abstract_params(config, scan_layers=scan_layers))
    fresh = {} if head_key is None else missing_head(wanted, stored, config)
    read = params_to_read(Path(folder), stored, wanted, fresh, config)
    check_tied(stored, config)
    flat = _flat_shardings(shardings, wanted)
    jobs: list[_Job] = []
    for path, leaf in fresh.items():
        value = _initial_head(path, leaf.shape, config, head_key, dtype)
        jobs += _value_jobs(path, value, flat[path])
    for path, leaf in read.items():
        owners = names.tensor_names(path, leaf.shape, config.model_type)
        source = _Source(path, leaf.shape, [stored[name] for name in owners])
        jobs += _file_jobs(source, dtype, flat[path], _used(quantization, path, config))
    return paths.unflatten(_run(jobs, progress, readers))


class _Job(NamedTuple):
    """One step of loading one parameter, and how its arrays are read."""

    path: str
    loader: DeviceLoader
    step: tuple[int, ...]
    read: Callable[[Slices], np.ndarray]

    def run(self) -> list[np.ndarray]:
        """Read the distinct parts that the step brings."""
        return [self.read(part) for part in self.loader.indices(self.step)]


class _Source(NamedTuple):
    """A parameter, and the stored tensors that it stacks."""

    path: str
    shape: tuple[int, ...]
    tensors: list[StoredTensor]


@dataclass(frozen=True)
class _Quantize:
    """Quantize matrices for use in `dtype`; hashable, for jit."""

    quantization: Quantization
    dtype: np.dtype

    def __call__(self, matrices: jax.Array) -> Quantized:
        """Quantize (..., in, out)."""
        return self.quantization.quantize(matrices, self.dtype)


def _used(
    quantization: Quantization | None, path: str, config: ModelConfig
) -> Quantization | None:
    """Return the quantization of one parameter: only linear kernels have any."""
    linear = re.fullmatch(family_of(config).kind.linear, path)
    return quantization if linear else None


def _file_jobs(
    source: _Source,
    dtype: DTypeLike | None,
    sharding: Any,
    quantization: Quantization | None,
) -> list[_Job]:
    """Return the steps that load one parameter from its files."""
    target = _target_dtype(source.tensors, dtype)
    encode: Encode | None = None
    if quantization is not None:
        quantization.check(source.path, source.shape)
        encode = _Quantize(quantization, target)
        target = _target_dtype(source.tensors, None)
    depth = names.stacked_axes(source.path)
    loader = DeviceLoader(source.shape, target, depth, sharding, encode)
    read = _reader(source, target)
    return [_Job(source.path, loader, step, read) for step in loader.steps]


def _value_jobs(path: str, value: np.ndarray, sharding: Any) -> list[_Job]:
    """Return the steps that place a parameter which is on the host already."""
    loader = DeviceLoader(value.shape, value.dtype, 0, sharding)
    return [_Job(path, loader, step, value.__getitem__) for step in loader.steps]


def _run(jobs: list[_Job], progress: Progress | None, readers: int) -> dict[str, Any]:
    """Load all parameters, in order: {path: array or Quantized}."""
    total = sum(job.loader.bytes for job in jobs)
    waiting = ((job, job.loader.bytes, job.run) for job in jobs)
    params, done = {}, 0
    for job, blocks in read_ahead(waiting, readers=readers):
        job.loader.put(job.step, blocks)
        done += job.loader.bytes
        if job.step == job.loader.steps[-1]:
            params[job.path] = job.loader.finish()
        if progress is not None:
            progress(done, total)
    return params


def _flat_shardings(
    shardings: Mapping[str, Any] | None, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Return {path: sharding}, or None for each where none are given."""
    if shardings is None:
        return dict.fromkeys(wanted)
    flat = paths.flatten(shardings)
    odd = flat.keys() ^ wanted.keys()
    if odd:
        raise InputError(
            f"shardings and parameters differ at {min(odd)!r}: give one for each"
        )
    return flat


def _initial_head(
    path: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    key: jax.Array | None,
    dtype: DTypeLike | None,
) -> np.ndarray:
    """Initialize a parameter of the head: kernels N(0, range²), biases 0."""
    assert key is not None
    assert isinstance(config, EncoderConfig)
    value = np.zeros(shape, np.float32)
    if names.is_transposed(path):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        value = config.initializer_range * jax.random.normal(own, shape)
    return np.asarray(value).astype(jnp.dtype(dtype or jnp.float32))


def _target_dtype(
    tensors: Collection[StoredTensor], dtype: DTypeLike | None
) -> np.dtype:
    """Return the dtype in which a parameter reaches its devices."""
    stored = jnp.result_type(*(tensor.dtype for tensor in tensors))
    return np.dtype(jax.dtypes.canonicalize_dtype(stored if dtype is None else dtype))


def _reader(source: _Source, target: np.dtype) -> Callable[[Slices], np.ndarray]:
    """Return a function that reads any slice of a parameter from its tensors."""
    shape, tensors = source.shape, source.tensors
    depth = names.stacked_axes(source.path)
    numbers = np.arange(len(tensors)).reshape(shape[:depth])

    def read(index: Slices) -> np.ndarray:
        extents = [len(range(n)[part]) for n, part in zip(shape, index, strict=True)]
        block = np.empty(extents, target)
        matrices, inner = block.reshape(-1, *extents[depth:]), index[depth:]
        chosen = numbers[index[:depth]].ravel()
        for matrix, number in zip(matrices, chosen, strict=True):
            tensor = tensors[number]
            if names.is_transposed(source.path):
                _copy(matrix.T, tensor.read(inner[::-1]), tensor.name)
            else:
                _copy(matrix, tensor.read(inner), tensor.name)
        return block

    return read


def _copy(target: np.ndarray, stored: np.ndarray, name: str) -> None:
    """Copy and cast a few rows at a time: many times faster where one is transposed.

    Values are checked while these rows are in the processor's cache.
    """
    widens = jnp.promote_types(stored.dtype, target.dtype) == target.dtype
    checked = stored.dtype if widens else target.dtype
    as_bits = checked == target.dtype  # NumPy then lets other threads run
    if as_bits:
        target = target.view(f"u{target.itemsize}")
    for row in range(0, len(stored), _ROWS):
        part = cast(stored[row : row + _ROWS], checked, name)
        target[row : row + _ROWS] = part.view(target.dtype) if as_bits else part
