"""The README's Python runs as it stands, and its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import tsd_jax as tsd

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_library_example_trains_and_merges():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    apply, x = names["model"].apply, names["x"]
    bound = tsd.bind(names["params"], {}, {})
    merged_loss = float(((apply({"params": bound}, x) - names["y"]) ** 2).mean())
    assert float(names["loss"]) < 0.05
    assert abs(merged_loss - float(names["loss"])) < 0.02


def test_methods_named_are_those_there_are():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert rows[: len(tsd.METHODS)] == list(tsd.METHODS)


def test_files_named_exist():
    for name in (
        "configs/llama_tsd.py",
        "configs/default.py",
        "tests/test_own_loop.py",
    ):
        assert name in README
        assert (ROOT / name).exists()
