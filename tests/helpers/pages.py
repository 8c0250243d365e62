"""The project's pages as programs: their fences, and running the Python in them."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
    ]
)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)
FOREIGN = 'python title="with torch, transformers and peft"'
"""The info string of Python that needs those packages too."""


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page.

    Attributes:
      info: what stands behind the opening backticks.
      body: the lines between, without the fence's indentation.
      line: number of the page's lines before `body`.
    """

    info: str
    body: str
    line: int

    @property
    def language(self) -> str:
        """First word of the info string."""
        return self.info.partition(" ")[0]


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def fences(text: str) -> list[Fence]:
    """Return all fenced blocks of a page, in order."""
    return [
        Fence(
            info=found["info"].strip(),
            body=re.sub(f"^{found['indent']}", "", found["body"], flags=re.MULTILINE),
            line=text.count("\n", 0, found.start("body")),
        )
        for found in FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text)


def _steps(page: str, foreign: bool) -> Iterator[tuple[Fence, str]]:
    """Yield every Python block and what the page says it prints."""
    blocks = fences(read(page))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python" or (block.info == FOREIGN and not foreign):
            continue
        printed = after is not None and after.language == "text"
        gap = after.line - block.line - block.body.count("\n") if after else 0
        yield block, after.body if after and printed and gap == 3 else ""


def run_python(page: str, *, foreign: bool = False) -> dict[str, Any]:
    """Run all Python blocks of a page in a row, and compare what each prints.

    A ```text block right after a Python block, with one empty line between, is its
    output.

    Args:
      page: path from the project's root.
      foreign: whether to run blocks that need torch, too.

    Returns:
      The names that the page has defined.
    """
    # A module of its own, where dataclasses look their annotations up.
    module = types.ModuleType(f"page {page}")
    sys.modules[module.__name__] = module
    names: dict[str, Any] = vars(module)
    for block, expected in _steps(page, foreign):
        # Padded, so that errors name the page's own line.
        source = "\n" * block.line + block.body
        code = compile(source, str(ROOT / page), "exec", dont_inherit=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected, f"{page}:{block.line}"
    return names
