"""Which way imports go: read from the syntax of every module, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import tsd_jax

ROOT = Path(__file__).resolve().parent.parent
ALL = "everything"

# Each room of tsd_jax, and the other rooms it may import.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "extraction": {"core"},
    "binding": {"core"},
    "models": {"core"},
    "data": {"core"},
    "evaluation": {"core"},
    "storage": {"core", "extraction"},
    "huggingface": {"core", "models", "data", "storage"},
    "training": {"core", "extraction", "storage"},
    "analysis": {"core", "storage"},
    "demo": set(),
    "app": {ALL},
    "__init__": {ALL},
}
HEAVY = {"datasets", "huggingface_hub", "matplotlib", "tokenizers", "transformers"}
# Rooms whose only purpose is the package.
AT_HOME = {
    ("tsd_jax.analysis.plots", "matplotlib"),
    ("tsd_jax.analysis.maps", "matplotlib"),
}
SETTINGS = {"absl", "ml_collections"}


class Import(NamedTuple):
    """One import: who, what, in which line, and whether loading the module runs it."""

    importer: str
    imported: str
    line: int
    eager: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(importer: str, package: str, tree: ast.AST) -> Iterator[Import]:
    """Walk a module; what stands in a function or for type checkers is not eager."""

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(importer, name.name, node.lineno, eager)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            parts = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for name in node.names:  # a submodule, or a name: both begin alike
                yield Import(importer, f"{base}.{name.name}", node.lineno, eager)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        eager = eager and not inside and not type_checking(node)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager)

    return walk(tree, eager=True)


def read(folder: str) -> list[Import]:
    """Read all imports of a file or of all modules below a folder."""
    start = ROOT / folder
    found: list[Import] = []
    for path in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = ".".join(parts[:-1])
        name = package if parts[-1] == "__init__" else ".".join(parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += imports_of(name, package, tree)
    return found


LIBRARY = read("tsd_jax")
BENCH = read("bench") if (ROOT / "bench").is_dir() else []
EXAMPLES = read("examples")
PROGRAM = [*LIBRARY, *read("train.py"), *read("configs"), *BENCH]


def top(imported: str) -> str:
    return imported.partition(".")[0]


def room(name: str) -> str:
    """Return the room of a module of ours; the top itself is "__init__"."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def test_every_module_is_in_a_known_room():
    folders = {path.name for path in (ROOT / "tsd_jax").iterdir() if path.is_dir()}
    files = {path.stem for path in (ROOT / "tsd_jax").glob("*.py")}
    assert folders - {"__pycache__"} | files == set(ROOMS)
    assert len(LIBRARY) > 100  # the walk found them


def test_rooms_import_only_what_they_may():
    wrong = [
        str(found)
        for found in LIBRARY
        if top(found.imported) == "tsd_jax"
        and room(found.imported) != room(found.importer)
        and not {ALL, room(found.imported)} & ROOMS[room(found.importer)]
    ]
    assert wrong == []


def test_nobody_imports_the_program_or_its_tests():
    outside = {"train", "configs", "bench", "examples", "tests"}
    wrong = [str(found) for found in LIBRARY if top(found.imported) in outside]
    # It counts what the tests prove, with their models.
    counts = "bench.exactness"
    wrong += [
        str(f)
        for f in PROGRAM
        if top(f.imported) in {"train", "tests"} and f.importer != counts
    ]
    assert wrong == []


def test_only_the_program_imports_app():
    wrong = [
        str(found)
        for found in PROGRAM
        if found.imported.startswith("tsd_jax.app")
        and not found.importer.startswith("tsd_jax.app")
        and found.importer != "train"
    ]
    assert wrong == []


def test_examples_import_as_users_do():
    """The library, and nothing of this repository beside it."""
    ours = {"train", "configs", "bench", "tests"}
    assert {f.importer for f in EXAMPLES} >= {"examples.nnx_training"}
    assert [str(f) for f in EXAMPLES if top(f.imported) in ours] == []
    assert [str(f) for f in EXAMPLES if f.imported.startswith("tsd_jax.app")] == []


def test_configs_are_data():
    known = {"ml_collections", *sys.stdlib_module_names}
    found = read("configs")
    assert {f.importer for f in found} >= {"configs.default", "configs.demo"}
    wrong = [
        str(f)
        for f in found
        if top(f.imported) not in known and f.imported != "configs.default"
    ]
    assert wrong == []


def test_the_library_sees_no_settings():
    """No flag and no ConfigDict below the program itself."""
    seeing = {found.importer for found in LIBRARY if top(found.imported) in SETTINGS}
    assert seeing == {"tsd_jax.app.train"}


def test_torch_is_nowhere():
    """A benchmark may compare with it, in the function that does."""
    wrong = [
        str(found)
        for found in PROGRAM
        if top(found.imported) in {"torch", "peft"}
        and (found.eager or not found.importer.startswith("bench"))
    ]
    assert wrong == []


def test_heavy_packages_are_imported_where_they_are_needed():
    wrong = [
        str(found)
        for found in PROGRAM
        if found.eager
        and top(found.imported) in HEAVY
        and (found.importer, top(found.imported)) not in AT_HOME
    ]
    assert wrong == []


def test_importing_the_library_loads_nothing_heavy():
    """Also not by way of others' modules."""
    heavy = sorted(HEAVY | SETTINGS - {"absl"} | {"torch", "tensorboardX", "flax.nnx"})
    code = f"import sys, tsd_jax; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_there_each_once():
    assert len(set(tsd_jax.__all__)) == len(tsd_jax.__all__)
    assert all(hasattr(tsd_jax, name) for name in tsd_jax.__all__)
    named = {
        f.imported
        for f in LIBRARY
        if f.importer == "tsd_jax" and top(f.imported) == "tsd_jax"
    }
    assert {name.rpartition(".")[2] for name in named} == set(tsd_jax.__all__)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("import a.b", [("a.b", True)]),
        ("from a import b, c", [("a.b", True), ("a.c", True)]),
        ("from . import b", [("tsd_jax.core.b", True)]),
        ("from ..data.x import y", [("tsd_jax.data.x.y", True)]),
        ("def f():\n    import a", [("a", False)]),
        ("if TYPE_CHECKING:\n    import a", [("a", False)]),
        ("class A:\n    import a", [("a", True)]),
        ("try:\n    import a\nexcept ImportError:\n    pass", [("a", True)]),
    ],
)
def test_the_walk_itself(source, want):
    found = imports_of("tsd_jax.core.m", "tsd_jax.core", ast.parse(source))
    assert [(f.imported, f.eager) for f in found] == want
