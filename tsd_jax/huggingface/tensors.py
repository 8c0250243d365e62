"""Folders of safetensors files: learn everything from the headers, then read slices.

A folder holds `model.safetensors`, or several files and `model.safetensors.index.json`.
safetensors checks the files; their bytes are then mapped by NumPy, because slices of
safetensors hold Python's lock while they read, and copies out of NumPy's map do not:
several threads read at a time.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tsd_jax.core.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Describe one tensor of a file; its bytes stay there until they are used."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    source: np.ndarray = dataclasses.field(repr=False)
    file_size: int

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Return the part `index` names as stored: a view of the mapped file, read-only.

        Raises:
          InputError: if the file is not what it was when it was opened.
        """
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size != self.file_size:  # a lost page would end the process
            reason = OSError(f"{size:,} bytes, no longer {self.file_size:,}")
            raise _damaged(self.file, reason)
        return self.source[index]


def open_tensors(folder: str | Path, buffers: str = "") -> dict[str, StoredTensor]:
    """Describe every tensor in `folder` from the headers of its files.

    Args:
      folder: of a checkpoint.
      buffers: expression for names that are left out.

    Raises:
      InputError: if a file is missing, corrupt or truncated, if the index and the
        files disagree, or if weights are not floats; the line names the file.
    """
    folder = Path(folder)
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return _read_header(single, buffers)
    if index.is_file():
        return _read_index(index, buffers)
    raise InputError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: fetch one, or convert "
        "its weights with transformers' save_pretrained"
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
      InputError: if the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"cannot read {file} ({reason}): a model folder in Hugging Face format "
            "has this file"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} is not a JSON object: fetch it again")
    return value


def _read_index(index: Path, buffers: str) -> dict[str, StoredTensor]:
    """Describe the tensors an index lists, each from the file it names."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and file and Path(file).name == file
        for file in listed.values()
    ):
        raise InputError(
            f'{index} has no "weight_map" from tensors to file names: fetch it again'
        )
    headers = {
        file: _read_header(index.parent / file, buffers)
        for file in sorted({*listed.values()})
    }
    listed = {n: file for n, file in listed.items() if not re.fullmatch(buffers, n)}
    for name, file in listed.items():
        if name not in headers[file]:
            raise InputError(
                f"{index.parent / file} lacks tensor {name!r}, which {index.name} says "
                "it holds: fetch both again"
            )
    return {name: headers[file][name] for name, file in listed.items()}


def _read_header(file: Path, buffers: str) -> dict[str, StoredTensor]:
    """Describe the tensors of one file; opening checks that no byte is missing."""
    if not file.is_file():
        raise InputError(f"{file} does not exist: fetch the missing file")
    try:
        with safe_open(file, framework="np") as opened:
            kept = [n for n in opened.keys() if not re.fullmatch(buffers, n)]  # noqa: SIM118
            slices = {name: opened.get_slice(name) for name in kept}
            kinds = {name: each.get_dtype() for name, each in slices.items()}
        places, content = _map(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    for name, kind in kinds.items():
        if kind not in _DTYPES:
            raise InputError(
                f"{file} stores tensor {name!r} as {kind}: quantized weights are not "
                f"supported, use one of {', '.join(_DTYPES)}"
            )
    tensors = {}
    for name, source in slices.items():
        shape, dtype = tuple(source.get_shape()), _DTYPES[kinds[name]]
        stored = content[slice(*places[name])].view(dtype).reshape(shape)
        tensors[name] = StoredTensor(name, file, shape, dtype, stored, content.size)
    return tensors


def _map(file: Path) -> tuple[dict[str, tuple[int, int]], np.ndarray]:
    """Return where each tensor of a checked file lies in its bytes, and those, mapped.

    Source: the format's specification in safetensors' README.
    """
    content = np.memmap(file, np.uint8, mode="r")
    start = 8 + int(content[:8].view("<u8")[0])
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    places = {
        name: (start + each["data_offsets"][0], start + each["data_offsets"][1])
        for name, each in header.items()
    }
    return places, np.asarray(content)


def _damaged(file: Path, error: Exception) -> InputError:
    """Say that a file's content is not what its format asks."""
    reason = str(error).replace("\n", " ")
    return InputError(f"{file} is corrupt or truncated ({reason}): fetch it again")
