"""Files that appear complete or not at all, and JSON objects in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, then rename it into place.

    Args:
      file: the file to create or replace.
      write: writes the whole content to the path it is given.
    """
    beside = file.with_name(f".{file.name}.part")
    try:
        write(beside)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(
    file: Path, content: Mapping[str, Any], *, sort_keys: bool = False
) -> None:
    """Write an indented JSON object atomically."""
    write_text(file, json.dumps(content, indent=2, sort_keys=sort_keys) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: the file is missing, is not JSON, or is not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"cannot read {file} ({reason}): check the folder's name, or fetch the file"
        ) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object: fetch it again")
    return content


def read_json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or holds anything else."""
    try:
        return read_json(file)
    except InputError:
        return {}
