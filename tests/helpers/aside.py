"""Programs with packages that `make test-interop` puts in folders of their own.

These are of versions, or have dependencies, that cannot be installed beside ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_aside(folder: str, module: str, *arguments: str) -> str:
    """Run `python -m module` with a folder of packages first; return what it prints."""
    packages = Path(sys.prefix) / folder
    if not packages.is_dir():
        pytest.fail(f"{packages} does not exist: `make test-interop` fills it")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout
