"""The shape of the code: short files, short functions, a test file for every module."""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "tsd_jax").rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_MEDIAN = 350, 60, 8


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def span(node: ast.FunctionDef) -> int:
    """Count the lines from `def` to the last one, the docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def body_lines(node: ast.FunctionDef) -> int:
    """Count the lines of the body, without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_files_are_short():
    assert len(MODULES) > 80
    lines = {file: file.read_text(encoding="utf-8").count("\n") for file in MODULES}
    long = {str(f.relative_to(ROOT)): n for f, n in lines.items() if n > MAX_FILE}
    assert long == {}


def test_functions_are_short():
    long = [
        f"{file.relative_to(ROOT)}:{node.name} has {span(node)} lines"
        for file in MODULES
        for node in functions(file)
        if span(node) > MAX_FUNCTION
    ]
    assert long == []


def test_the_median_function_is_a_few_lines():
    sizes = [body_lines(node) for file in MODULES for node in functions(file)]
    assert len(sizes) > 800
    assert statistics.median(sizes) <= MAX_MEDIAN


def mirror(module: Path) -> Path:
    """Name the test file of a module: tsd_jax/a/b.py has tests/a/test_b.py."""
    inside = module.relative_to(ROOT / "tsd_jax")
    return ROOT / "tests" / inside.parent / f"test_{inside.name}"


def test_every_module_has_its_test_file():
    missing = [
        str(mirror(module).relative_to(ROOT))
        for module in MODULES
        if module.name != "__init__.py" and not mirror(module).is_file()
    ]
    assert missing == []


def test_the_wheel_has_every_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = setup["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in MODULES}
    here = {".".join(folder.parts) for folder in folders}
    assert sorted(listed) == sorted(here | {"tsd_jax.configs"})


# Packages named by the project's charter, whether or not the library imports them yet.
NAMED = {"chex", "datasets", "sentencepiece"}
# A distribution's name, where it is not the name that is imported.
IMPORTED_AS = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "ml_dtypes": "ml_dtypes",
}


def third_party() -> set[str]:
    import sys

    names = set()
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    ours = {"tsd_jax", "configs", "__future__"}
    return names - set(sys.stdlib_module_names) - ours


def test_what_is_imported_is_declared_and_nothing_else():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z][\w.-]*)", text, flags=re.MULTILINE)
    declared = {IMPORTED_AS.get(name, name) for name in found}
    assert declared - NAMED == third_party() - {"jaxlib"}
    assert declared >= NAMED


@pytest.mark.parametrize(
    ("source", "lines"),
    [("def f():\n    return 1\n", 1), ('def f():\n    """D."""\n    return 1\n', 1)],
)
def test_the_count_itself(source, lines):
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert body_lines(node) == lines
