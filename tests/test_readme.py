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
from tests.test_imports import ALL, ROOMS
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
    program = ast.Import | ast.ImportFrom | ast.Assign | ast.FunctionDef | ast.For
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(node, program) for node in ast.walk(tree)) or any(
        isinstance(func, ast.Attribute) or ast.unparse(func) == "print"
        for func in calls  # "scale (96,)" is a call too, but printed
    )


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
        ("tsd.launch(params)\n", True),
        ("norm/scale (96,)\n", False),
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
    path = rf"({'|'.join(FOLDERS)})/[a-z0-9_./]*"
    named = [word for word in words if re.fullmatch(path, word)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != "CHANGELOG.md"])
def test_config_keys_named_exist(page):
    config = default.get_config()
    sections = [key for key in config if hasattr(config[key], "keys")]
    known = {f"{section}.{key}" for section in sections for key in config[section]}
    known |= {*config, "KEY"}
    commands = "\n".join(f.body for f in fences(read(page)) if f.language == "bash")
    named = re.findall(r"--config\.([\w.]+)", commands + prose(read(page)))
    section = "|".join(sections)
    for code in CODE.findall(prose(read(page))):
        named += re.findall(rf"^((?:{section})\.\w+)(?:=.*)?$", code)
    keys = [key for key in named if not key.endswith((".py", ".safetensors"))]
    assert [key for key in keys if key not in known] == []


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
    assert [row.split("`")[1] for row in rows] == list(tsd.METHODS)


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


def test_the_rooms_are_those_that_imports_are_held_to():
    rows = [
        row.strip("| ").split(" | ") for row in table("docs/architecture.md", "| room")
    ]
    everything = {"everything": {ALL}, "nothing": set()}
    rooms = {
        room.strip("`"): everything.get(may, {*may.split(", ")})
        for room, _, may in rows
    }
    assert rooms == {room: may for room, may in ROOMS.items() if room != "__init__"}


def test_modules_named_in_the_architecture_exist():
    rooms = "|".join(room for room in ROOMS if room != "__init__")
    named = {
        code
        for code in CODE.findall(prose(read("docs/architecture.md")))
        if re.fullmatch(rf"({rooms})/[\w./]+", code)
    }
    assert len(named) > 30
    assert (
        sorted(name for name in named if not (ROOT / "tsd_jax" / name).exists()) == []
    )


def test_what_the_architecture_finds_is_there():
    rows = table("docs/architecture.md", "| what | file")
    for row in rows:
        _, files, names = (cell.strip() for cell in row.strip("|").split(" | "))
        places = [ROOT / "tsd_jax" / name for name in CODE.findall(files)]
        texts = [place.read_text() for place in places if place.is_file()]
        name = CODE.search(names)
        if texts and name and "/" not in name[1]:
            assert all(re.search(rf"\b{name[1]}\b", text) for text in texts), row


def test_the_changelog_names_the_config_keys_there_are():
    config = default.get_config()
    pair = r"\| `(\w+)\.\w+` \| `(\w+)\.(\w+)` \|"
    named = [
        (section, key)
        for before, section, key in re.findall(pair, read("CHANGELOG.md"))
        if before not in ("tsd", "huggingface")
    ]
    assert len(named) == 8
    assert all(key in config[section] for section, key in named)
