"""Files of a training run: their names, and the config that owns its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.storage.atomic import read_json_or_empty, write_text

CONFIG = "config.json"
"""The settings of a run, what it read and what it ran on, in its workdir."""

METRICS = "metrics.jsonl"
"""Figures of a run as it goes on."""

SUMMARY = "summary.json"
"""Figures of a finished run."""

DIRECTIONS = "directions.npz"
"""What a launch ranked."""

ADAPTER = "adapter.safetensors"
"""The trained adapter in the library's own format."""

PEFT_FOLDER = "adapter"
"""The trained adapter in PEFT's format."""

CHECKPOINTS, PLOTS = "checkpoints", "plots"
"""Folders of a run."""

_WRITTEN = (METRICS, SUMMARY, DIRECTIONS, ADAPTER, PEFT_FOLDER, CHECKPOINTS, PLOTS)


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
        config or files of a run without its config, or has a config that cannot be
        read.
    """
    for folder in (workdir, *workdir.parents):
        if os.path.exists(folder) and not folder.is_dir():
            raise InputError(f"workdir {workdir}: {folder} is a file; name a folder")
    path = workdir / CONFIG
    if not os.path.exists(path):
        _refuse_leftovers(workdir)
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


def _refuse_leftovers(workdir: Path) -> None:
    """Raise InputError where a workdir without a config holds files of a run."""
    found = [name for name in _WRITTEN if (workdir / name).exists()]
    found += sorted(path.name for path in workdir.glob("events.out.*"))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(
            f"workdir {workdir} holds {found[0]}{more} of a run, but no {CONFIG} that "
            f"says of which: use a new --workdir, or put its {CONFIG} back to resume it"
        )


def check_digests(
    workdir: Path, config: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Raise InputError where a file has changed since a workdir's run began.

    A run that recorded no digests is not checked.

    Args:
      workdir: of a run to resume.
      config: resolved and flat.
      digests: {"section.key" of a file, or "section.key/NAME" of a file in the folder
        it names: digest of what it holds}.
    """
    old = read_json_or_empty(workdir / CONFIG).get("digests", {})
    for key, digest in old.items():
        if digests.get(key) != digest:
            setting, _, name = key.partition("/")
            file = Path(str(config[setting])) / name
            raise InputError(
                f"{file} ({setting}) is not what it was when the run in {workdir} "
                "began: put the old file back to resume, or use a new --workdir"
            )
