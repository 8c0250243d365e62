"""Files of a run, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.extraction.matrix_launch import Ranking


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place."""
    beside = path.with_name(f".{path.name}.part")
    write(beside)
    os.replace(beside, path)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is no file or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_rankings(path: Path, report: Mapping[str, Ranking]) -> None:
    """Write launched indices, sigma and change rates: {"<kernel>/<field>": array}.

    Arrays are (matrices, k) for sigma and rates, (matrices, c) for indices, and where
    launch decided how many directions have gains, (matrices, 1) for used; a kernel
    that is not stacked has one matrix.
    """
    arrays = {
        f"{kernel}/{field}": np.asarray(value).reshape(-1, value.shape[-1])
        for kernel, ranking in report.items()
        for field, value in vars(ranking).items()
        if value is not None
    }

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


def claim_workdir(
    workdir: Path, config: Mapping[str, Any], free: tuple[str, ...]
) -> bool:
    """See whether a workdir can take this run; change nothing.

    Args:
      workdir: may not exist yet.
      config: resolved, flat: {"section.key": value}.
      free: keys that may differ when a run goes on.

    Returns:
      True if an earlier run of the same config lies there, to go on from.

    Raises:
      InputError: it is a file, a run of another config lies there, or its config
        cannot be read.
    """
    for place in (workdir, *workdir.parents):
        if place.exists() and not place.is_dir():
            raise InputError(f"workdir {workdir}: {place} is a file; name a folder")
    path = workdir / "config.json"
    if not path.exists():
        return False
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no config of a run; use a new workdir") from None
    new = json.loads(json.dumps(dict(config)))
    names = sorted((old.keys() | new.keys()) - set(free))
    different = [name for name in names if old.get(name) != new.get(name)]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise InputError(
            f"workdir {workdir} belongs to another config: {name} was "
            f"{old.get(name)!r}, now {new.get(name)!r}{more}; "
            "use a new --workdir, or the old values to go on"
        )
    return True
