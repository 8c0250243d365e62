"""The module of train.py, loaded once because its flags can be defined only once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
assert _spec is not None
assert _spec.loader is not None
train = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(train)
