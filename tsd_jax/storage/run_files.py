"""Files of a training run: its metrics, and the config that owns its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.storage.atomic import read_json_or_empty, write_text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; a line cut off by a crash is left out."""
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
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def claim_workdir(
    workdir: Path, config: Mapping[str, Any], free: tuple[str, ...]
) -> bool:
    """Return whether a workdir holds a run of this config to resume; change nothing.

    Args:
      workdir: of the run; may not exist yet.
      config: resolved and flat, {"section.key": value}.
      free: keys that may differ when a run is resumed.

    Raises:
      InputError: the workdir is a file or lies below one, holds a run of another
        config, or has a config that cannot be read.
    """
    for folder in (workdir, *workdir.parents):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"workdir {workdir}: {folder} is a file; name a folder")
    path = workdir / "config.json"
    if not path.exists():
        return False
    old = read_json_or_empty(path).get("config")
    if not isinstance(old, dict):
        raise InputError(f"{path} is not the config of a run; use a new workdir")
    new = json.loads(json.dumps(dict(config)))
    names = sorted((old.keys() | new.keys()) - set(free))
    different = [name for name in names if old.get(name) != new.get(name)]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise InputError(
            f"workdir {workdir} belongs to another config: {name} was "
            f"{old.get(name)!r}, now {new.get(name)!r}{more}; "
            "use a new --workdir, or the old values to resume"
        )
    return True
