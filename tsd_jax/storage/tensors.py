"""Single safetensors files: checked on opening, read and written as NumPy arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tsd_jax.core.errors import InputError
from tsd_jax.storage.atomic import write_atomically


class TensorHeader(NamedTuple):
    """The description of one tensor in a file's header.

    Attributes:
      dtype: the format's own name, such as "BF16".
      shape: of the tensor.
      start: position of the first byte in the file.
      stop: position after the last byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file atomically; the arrays must fit in memory twice."""
    content = save(dict(tensors), dict(metadata))
    write_atomically(file, lambda part: part.write_bytes(content))


def open_tensors(file: Path) -> Any:
    """Open a safetensors file for use in a `with`; its header and size are checked.

    Raises:
      InputError: the file is missing, corrupt or truncated.
    """
    if not file.is_file():
        raise InputError(
            f"{file} does not exist: check the path, or fetch the missing file"
        )
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def read_tensor(opened: Any, name: str, file: Path) -> np.ndarray:
    """Read one tensor of an open file in its stored dtype.

    Raises:
      InputError: NumPy has no such dtype, or the bytes cannot be read.
    """
    try:
        return opened.get_tensor(name)
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: cannot read tensor {name!r} ({reason})") from error


def read_tensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all tensors of a safetensors file, and its metadata.

    Raises:
      InputError: as `open_tensors` and `read_tensor`.
    """
    with open_tensors(file) as opened:
        names = list(opened.keys())
        tensors = {name: read_tensor(opened, name, file) for name in names}
        return tensors, dict(opened.metadata() or {})


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file: {tensor: its description}.

    Raises:
      InputError: as `open_tensors`.

    Source: the format's specification in safetensors' README.
    """
    with open_tensors(file), file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {
        name: TensorHeader(
            each["dtype"],
            tuple(each["shape"]),
            *(8 + size + offset for offset in each["data_offsets"]),
        )
        for name, each in header.items()
    }


def damaged(file: Path, reason: object) -> InputError:
    """Return the error for a file whose content is not what its format requires."""
    line = " ".join(str(reason).split())
    return InputError(f"{file} is corrupt or truncated ({line}): fetch it again")
