"""Files of this room: written whole or not at all, read or refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy bfloat16, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tsd_jax.core.errors import InputError


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `file`, then put it in its place."""
    beside = file.with_name(f".{file.name}.part")
    try:
        write(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file of arrays that fit into memory twice."""
    content = save(dict(tensors), dict(metadata))
    write_atomically(file, lambda part: part.write_bytes(content))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read {file} ({reason})") from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object: fetch it again")
    return content


def open_tensors(file: Path) -> Any:
    """Open a safetensors file, for use in a `with`; its header is checked here.

    Raises:
      InputError: the file is missing, or is no whole safetensors file.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist: name an existing file")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file} is no whole safetensors file ({reason}): fetch it again"
        ) from error


def read_tensor(opened: Any, name: str, file: Path) -> np.ndarray:
    """Read one tensor of an open file, in the type it is stored in.

    Raises:
      InputError: NumPy has no such type, or the bytes cannot be read.
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
