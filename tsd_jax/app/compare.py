"""Compare finished runs: `tsd-compare RUN [RUN ...]`.

Runs that differ in their seed alone share a row, as mean and standard deviation.
`python -m tsd_jax.app.compare` is the same command.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsd_jax.app.plan import table
from tsd_jax.core.errors import InputError
from tsd_jax.storage.atomic import read_json_or_empty
from tsd_jax.storage.run_files import CONFIG, PEFT_FOLDER, PLOTS, SUMMARY

_HEAD = ("method", "seeds", "before", "after", "launch", "trainable", "tokens/s")
_FIGURES = ("accuracy", "exact_match", "spearman", "nll")


def read_run(folder: Path) -> dict[str, Any]:
    """Return one run's summary and config.

    Raises:
      InputError: the folder holds no finished run.
    """
    summary = read_json_or_empty(folder / SUMMARY)
    config = read_json_or_empty(folder / CONFIG).get("config")
    if not summary or config is None:
        raise InputError(f"{folder} holds no finished run (no {SUMMARY})")
    if not summary.get("after"):
        raise InputError(f"{folder} holds a run without evaluation: leave it out")
    return {"folder": folder, "config": config, **summary}


def figure_of(run: dict[str, Any]) -> str:
    """Return the name of the figure a run was evaluated by."""
    return next(name for name in _FIGURES if name in run["after"])


def _name(run: dict[str, Any]) -> str:
    return run["method"] + (" keep" if run["keep"] else "")


def group_runs(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return runs in groups whose configs differ in nothing but the seed, in order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        same = {key: value for key, value in run["config"].items() if key != "seed"}
        groups.setdefault(repr(sorted(same.items())), []).append(run)
    return list(groups.values())


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {statistics.stdev(values):.4f}"


def _row(runs: list[dict[str, Any]]) -> tuple[str, ...]:
    figure, first = figure_of(runs[0]), runs[0]
    speed = statistics.fmean(run["train_tokens_per_second"] for run in runs)
    return (
        _name(first),
        str(len(runs)),
        _spread([run["before"][figure] for run in runs]),
        _spread([run["after"][figure] for run in runs]),
        "-" if first["launch_step"] is None else str(first["launch_step"]),
        f"{first['trainable_params']:,}",
        f"{speed:,.0f}",
    )


def compare(folders: Sequence[Path]) -> str:
    """Return the table of runs, and where their adapters and plots are."""
    runs = [read_run(folder) for folder in folders]
    figures = {figure_of(run) for run in runs}
    rows = [_row(group) for group in group_runs(runs)]
    files = [
        f"{_name(run)}: adapter in {run['folder'] / PEFT_FOLDER}, "
        f"plots in {run['folder'] / PLOTS}"
        for run in runs
    ]
    steps = ", ".join(sorted({str(run["steps"]) for run in runs}))
    head = f"{' / '.join(sorted(figures))} before and after {steps} steps"
    return "\n".join([head, table([_HEAD, *rows]), *files])


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(compare([Path(argument) for argument in argv]))
    except InputError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    return 0


def cli() -> None:
    """Run as the command `tsd-compare`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    cli()
