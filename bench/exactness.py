"""Compare adapters with stock transformers and PEFT, family by family and by chance.

    python bench/exactness.py                      families, optimizers, bindings, modes
    python bench/exactness.py --draws 1000         and drawn settings of PEFT
    python bench/exactness.py --draws 100 --first 500      keeps no results

Small random models in float32. Stock PEFT makes an adapter and saves it. A row has the
largest difference of logits between the stock model and ours: of the adapter as read,
written again and read by PEFT, merged, and merged in bfloat16. Drawn settings of PEFT
vary targets, patterns, layers, full modules, token rows, tying, DoRA, rsLoRA and ranks,
on bases of every family. Each is equal to 2e-4, or refused in one line. What the tests
prove of optimizers, bindings and JAX's modes is counted from the tests themselves.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench/results/exactness.json"
PAGE, START, END = ROOT / "docs/models.md", "<!-- exactness -->", "<!-- end -->"
WAYS = ("peft in", "peft out", "merged", "merged bf16")
EQUAL = 2e-4
# {row: (the tests that prove it, whether their cases are refusals)}.
PROOFS = {
    "optimizers of optax whose moments restart": (
        "training/test_moments.py::"
        "test_updates_after_a_reset_are_those_of_a_fresh_optimizer",
        False,
    ),
    "optimizer states that cannot restart": (
        "training/test_moments.py::test_unknown_states_are_refused_by_name",
        True,
    ),
    "the Linen binding": ("binding/linen/test_binding.py", False),
    "the NNX binding": ("binding/nnx/test_binding.py", False),
    "JAX's modes": ("binding/test_jax_modes.py", False),
}


def families(root: Path) -> dict[str, dict[str, float | str]]:
    """Measure a plain adapter on a base of every family, and print a line each."""
    from tests.helpers.exactness import of_family
    from tests.helpers.peft_draws import BASES

    rows = {}
    print(f"{'family':<14}" + "".join(f"{way:>14}" for way in WAYS))
    for name in BASES:
        if name.endswith(" tied"):
            continue
        folder = root / name
        folder.mkdir()
        rows[name] = of_family(name, folder)
        shown = (_short(rows[name].get(way, "")) for way in WAYS)
        print(f"{name:<14}" + "".join(f"{each:>14}" for each in shown), flush=True)
    return rows


def _short(answer: float | str) -> str:
    return answer if isinstance(answer, str) else f"{answer:.1e}"


def draws(count: int, first: int, root: Path) -> dict[str, Any]:
    """Run drawn settings; return how many were equal, refused or wrong, by way."""
    from tests.helpers.exactness import Draws

    found, counts = Draws(root), collections.defaultdict(collections.Counter)
    wrong: list[Any] = []
    largest = 0.0
    for seed in range(first, first + count):
        drawn = found.run(seed)
        for way, answer in drawn["answers"].items():
            if isinstance(answer, str):
                counts[way]["refused"] += 1
            elif answer < EQUAL:
                counts[way]["equal"] += 1
                largest = max(largest, answer)
            else:
                counts[way]["wrong"] += 1
                wrong.append(drawn)
        if (seed + 1 - first) % 50 == 0:
            print(f"{seed + 1 - first} draws, {len(wrong)} wrong", flush=True)
    return {"count": count, "ways": counts, "largest": largest, "wrong": wrong}


def proofs(root: Path) -> dict[str, dict[str, int]]:
    """Run the tests of `PROOFS`; return how many cases passed, failed or refuse."""
    rows, file = {}, root / "outcomes.xml"
    for name, (tests, refuses) in PROOFS.items():
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}"]
        subprocess.run([*command, str(ROOT / "tests" / tests)], cwd=ROOT, check=False)
        (suite,) = ElementTree.parse(file).getroot()
        total, bad = (int(suite.attrib[each]) for each in ("tests", "failures"))
        bad += int(suite.attrib["errors"])
        rows[name] = {"refused" if refuses else "passed": total - bad, "failed": bad}
    return rows


def table(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"| family | {' | '.join(WAYS)} |", "|---|" + "---|" * len(WAYS)]
    for name, row in result["families"].items():
        shown = [_short(row[way]) if way in row else "" for way in WAYS]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", "| drawn settings of PEFT | equal | refused | wrong |"]
    lines += ["|---|---|---|---|"]
    for way, counts in result["draws"]["ways"].items():
        numbers = (counts.get(each, 0) for each in ("equal", "refused", "wrong"))
        lines.append(f"| {way} | {' | '.join(map(str, numbers))} |")
    lines += ["", "| cases of the tests | passed | refused by name | failed |"]
    lines += ["|---|---|---|---|"]
    for name, row in result["proofs"].items():
        numbers = (row.get(each, 0) for each in ("passed", "refused", "failed"))
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def render(text: str) -> None:
    """Put the table between its marks in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    new = f"{before}{START}\n\n{text}\n\n{END}{after}"
    PAGE.write_text(new, encoding="utf-8")


def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    packages = ("jax", "flax", "torch", "transformers", "peft")
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{name: metadata.version(name) for name in packages},
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result: dict[str, Any] = environment()
        if args.draws:
            (root / "draws").mkdir()
            result["draws"] = draws(args.draws, args.first, root / "draws")
            print(json.dumps(result["draws"], default=str))
        if not args.first:
            result |= {"families": families(root), "proofs": proofs(root)}
    if not args.first and args.draws >= 1000:
        RESULT.write_text(json.dumps(result, indent=2, default=str) + "\n")
        render(table(result))


if __name__ == "__main__":
    main()
