"""The pages: all their Python runs, and what they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tsd_jax as tsd
from configs import default
from tests.helpers.pages import PAGES, ROOT, fences, prose, read, run_python
from tsd_jax import huggingface

LANGUAGES = {"bash", "json", "python", "text", "yaml"}
WITH_PYTHON = [
    page
    for page in PAGES
    if any(fence.language == "python" for fence in fences(read(page)))
]
FOLDERS = ("bench", "configs", "docs", "examples", "tests", "tsd_jax")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(read(page)), flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {re.sub(r"[ -]+", "-", word.strip()) for word in words}


def holds_python(text: str) -> bool:
    """Return whether a block is a Python program, and not only a value."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    program = ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef | ast.Call
    return any(isinstance(node, program) for node in ast.walk(tree))


def public_names(module: Any) -> set[str]:
    """Return the names a module's __init__ makes public."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def table(page: str, head: str) -> list[str]:
    """Return the rows of the table whose first row starts with `head`."""
    lines = prose(read(page)).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(head))
    rows = lines[start + 2 :]
    return rows[: next((n for n, r in enumerate(rows) if not r), len(rows))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_python(page)
    check = CHECKS.get(page)
    if check is not None:
        check(names, tmp_path)


def check_readme(names, _):
    apply, x = names["model"].apply, names["x"]
    merged_loss = ((apply({"params": names["merged"]}, x) - names["y"]) ** 2).mean()
    assert float(names["loss"]) < 0.05
    assert abs(float(merged_loss) - float(names["loss"])) < 0.02


def check_training(names, _):
    losses = names["losses"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 2


def check_your_model(names, folder):
    loss, merged_loss = map(float, names["losses"])
    assert loss < 1.2 < np.log(5)  # learned more than how many classes there are
    assert abs(merged_loss - loss) < 0.1
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


CHECKS: dict[str, Any] = {
    "README.md": check_readme,
    "docs/training.md": check_training,
    "docs/your_model.md": check_your_model,
}


def test_the_checks_are_of_pages_that_run():
    assert set(CHECKS) <= set(WITH_PYTHON)
    assert len(WITH_PYTHON) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_closed_and_name_their_language(page):
    text = read(page)
    found = fences(text)
    assert "```" not in prose(text)
    assert {fence.language for fence in found} <= LANGUAGES
    hidden = [f.line for f in found if f.language != "python" and holds_python(f.body)]
    assert hidden == [], f"{page}: Python in blocks that do not run"


@pytest.mark.parametrize(
    ("block", "want"),
    [
        ("import jax\n", True),
        ("x = 1\n", True),
        ("print(3)\n", True),
        ("True True\n", False),
        ("6\n", False),
        ("y = x K + γ (x A) B\n", False),
    ],
)
def test_python_is_recognized(block, want):
    assert holds_python(block) == want


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(read(page))):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT).as_posix()), target
        if page.startswith("docs/"):  # the site has these pages alone
            assert linked.is_relative_to(ROOT / "docs"), f"{page}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md"])
def test_files_named_exist(page):
    commands = " ".join(f.body for f in fences(read(page)) if f.language == "bash")
    words = [*CODE.findall(prose(read(page))), *commands.split()]
    named = [w for w in words if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./]*", w)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md"])
def test_config_keys_named_exist(page):
    config = default.get_config()
    sections = [key for key in config if hasattr(config[key], "keys")]
    known = {*config} | {f"{section}.{key}" for section in sections for key in config[section]}
    commands = "\n".join(f.body for f in fences(read(page)) if f.language == "bash")
    named = re.findall(r"--config\.([\w.]+)", commands + prose(read(page)))
    section = "|".join(sections)
    for code in CODE.findall(prose(read(page))):
        named += re.findall(rf"^((?:{section})\.\w+)(?:=.*)?$", code)
    files = ("adapter.safetensors", "model.safetensors")
    assert [k for k in named if k not in known and k not in (*files, "KEY")] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md"])
def test_make_targets_named_exist(page):
    makefile = read("Makefile")
    commands = "\n".join(f.body for f in fences(read(page)) if f.language == "bash")
    code = "\n".join([commands, *CODE.findall(prose(read(page)))])
    for target in re.findall(r"^(?:PYTHON=\S+ )?make ([\w-]+)", code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def test_methods_named_are_those_there_are():
    rows = table("README.md", "| method | at launch")
    assert [re.match(r"\| `(\w+)` \|", row)[1] for row in rows] == list(tsd.METHODS)


def test_the_method_page_shows_what_readme_shows():
    for page in ("README.md", "docs/method.md"):
        assert table(page, "| method |") == table("README.md", "| method | at launch")
    pictures = [
        next(f.body for f in fences(read(page)) if f.body.startswith("params "))
        for page in ("README.md", "docs/method.md")
    ]
    assert pictures[0] == pictures[1]


def test_every_public_name_has_its_line_in_api():
    rows = [row for row in read("docs/api.md").splitlines() if row.startswith("| `")]
    cells = [row.split(" | ")[0] for row in rows]
    for prefix, module in (
        ("tsd", tsd),
        ("huggingface", huggingface),
        ("tsd.nnx", tsd.nnx),
    ):
        pattern = rf"`{re.escape(prefix)}\.(\w+)`"
        named = [name for cell in cells for name in re.findall(pattern, cell)]
        assert len(named) == len(set(named)), f"{prefix}: a name has two lines"
        assert set(named) == public_names(module)
