"""The Python of README and docs runs as it stands and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np

import tsd_jax as tsd

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```)?", re.DOTALL
)


def run(file: str) -> dict:
    """Run all Python blocks of a page in a row, and compare what each prints."""
    names: dict = {}
    page = (ROOT / file).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) == page.count("```python")
    for block in blocks:
        line = page.count("\n", 0, block.start("code"))
        code = "\n" * line + block["code"]  # so that errors name the page's own line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, file, "exec"), names)
        assert printed.getvalue() == (block["output"] or ""), f"{file}:{line}"
    return names


def test_library_example_trains_and_merges():
    names = run("README.md")
    apply, x = names["model"].apply, names["x"]
    bound = tsd.bind(names["params"], {}, {})
    merged_loss = float(((apply({"params": bound}, x) - names["y"]) ** 2).mean())
    assert float(names["loss"]) < 0.05
    assert abs(merged_loss - float(names["loss"])) < 0.02


def test_your_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("docs/your_model.md")
    loss, merged_loss = map(float, names["losses"])
    assert loss < 1.2 < np.log(5)  # learned more than how many classes there are
    assert abs(merged_loss - loss) < 0.1
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_pages_with_code_are_all_run():
    with_code = {
        path.name
        for path in (ROOT / "docs").glob("*.md")
        if "```python" in path.read_text(encoding="utf-8")
    }
    assert with_code == {"your_model.md"}


def test_methods_named_are_those_there_are():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert rows[: len(tsd.METHODS)] == list(tsd.METHODS)


def test_files_named_exist():
    for name in (
        "configs/llama_tsd.py",
        "configs/default.py",
        "docs/your_model.md",
        "tests/test_own_loop.py",
    ):
        assert name in README
        assert (ROOT / name).exists()
