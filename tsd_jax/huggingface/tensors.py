"""The weights of a checkpoint: described by the files' headers, read slice by slice.

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`.
safetensors checks the files; NumPy then maps their bytes into memory. Reading slices
through safetensors holds Python's lock, copying out of NumPy's map does not, so that
several threads can read at a time.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from pathlib import Path, PurePosixPath

import jax.numpy as jnp
import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.model_folder import INDEX_FILE, WEIGHTS_FILE
from tsd_jax.huggingface.names import HEAD
from tsd_jax.storage.atomic import read_json
from tsd_jax.storage.tensors import TensorHeader, damaged, read_header

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, whose bytes are not read until they are used.

    Attributes:
      name: in the file.
      file: that holds it.
      shape: as stored.
      dtype: as stored.
      source: the tensor in the mapped file.
      file_size: in bytes, when the file was opened.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    source: np.ndarray = dataclasses.field(repr=False)
    file_size: int

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of the stored tensor: a read-only view of the mapped file.

        Raises:
          InputError: if the file's size has changed since it was opened.
        """
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size != self.file_size:  # reading a lost page would kill the process
            raise damaged(self.file, f"{size:,} bytes, no longer {self.file_size:,}")
        return self.source[index]


def open_checkpoint(folder: str | Path, buffers: str = "") -> dict[str, StoredTensor]:
    """Describe every tensor of a checkpoint, {name: tensor}, from its files' headers.

    Args:
      folder: of the checkpoint.
      buffers: regular expression for names to leave out.

    Raises:
      InputError: if a file is missing, corrupt or truncated, if the index and the
        files disagree, or if weights are not floats; the line names the file.
    """
    folder = Path(folder)
    files = {file: _open_file(file, buffers) for file in weight_files(folder)}
    if (folder / WEIGHTS_FILE).is_file():
        return files[folder / WEIGHTS_FILE]
    tensors = {}
    for name, file in _weight_map(folder / INDEX_FILE).items():
        if re.fullmatch(buffers, name):
            continue
        if name == HEAD and name not in files[folder / file]:
            continue  # some indices list a tied head, of which no file has a copy
        if name not in files[folder / file]:
            raise InputError(
                f"{folder / file} lacks tensor {name!r}, which {INDEX_FILE} says "
                "it holds: fetch both again"
            )
        tensors[name] = files[folder / file][name]
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights: the single one, or the index's.

    Raises:
      InputError: if there is neither, or the index is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        listed = _weight_map(folder / INDEX_FILE)
        return [folder / name for name in sorted({*listed.values()})]
    raise InputError(
        f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: fetch one, or "
        "convert its weights with transformers' save_pretrained"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Read {tensor: file name} from an index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and _is_inside(file) for file in listed.values()
    ):
        raise InputError(
            f'{index} has no "weight_map" from tensors to file names: fetch it again'
        )
    return {name: posixpath.normpath(file) for name, file in listed.items()}


def _is_inside(file: str) -> bool:
    """Return whether a path is of a file in the checkpoint's folder, or below it."""
    path = PurePosixPath(posixpath.normpath(file)) if file else PurePosixPath()
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def holds_floats(folder: Path) -> bool:
    """Return whether every tensor of a checkpoint is a plain float, by the headers.

    Raises:
      InputError: if a file is missing, corrupt or truncated.
    """
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return False
    headers = [read_header(file) for file in weight_files(folder)]
    return all(each.dtype in _DTYPES for some in headers for each in some.values())


def _open_file(file: Path, buffers: str) -> dict[str, StoredTensor]:
    """Describe the tensors of one file."""
    header = read_header(file)
    kept = {n: each for n, each in header.items() if not re.fullmatch(buffers, n)}
    for name, each in kept.items():
        if each.dtype not in _DTYPES:
            raise InputError(
                f"{file} stores tensor {name!r} as {each.dtype}: quantized weights are "
                f"not supported, use one of {', '.join(_DTYPES)}"
            )
    content = np.asarray(np.memmap(file, np.uint8, mode="r"))
    return {name: _stored(name, file, each, content) for name, each in kept.items()}


def _stored(
    name: str, file: Path, header: TensorHeader, content: np.ndarray
) -> StoredTensor:
    """Return the view of one tensor in its file's mapped bytes."""
    dtype = _DTYPES[header.dtype]
    source = content[header.start : header.stop].view(dtype).reshape(header.shape)
    return StoredTensor(name, file, header.shape, dtype, source, content.size)
