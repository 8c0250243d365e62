"""The record of a run: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from tsd_jax.storage.run_files import METRICS, read_lines, write_lines

LAUNCH_EVERY = 10.0
"""Seconds between lines about a launch, where there is no progress bar."""

QUIET_SECONDS = 10.0
"""Seconds between lines about loading, where there is no progress bar."""


class LoadingBar:
    """The progress of loading; call it with the bytes loaded and their total.

    A bar on a terminal; elsewhere plain lines, and none where loading is quick.

    Args:
      active: whether this process shows anything.
    """

    def __init__(self, *, active: bool = True):
        self._active, self._bar = active, None
        self._shown = monotonic()

    def __enter__(self) -> LoadingBar:
        if self._active and sys.stderr.isatty():
            self._bar = tqdm(
                desc="weights", unit="B", unit_scale=True, dynamic_ncols=True
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are loaded."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif self._active and monotonic() - self._shown > QUIET_SECONDS:
            self._shown = monotonic()
            print(f"weights: {done / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)


class Recorder:
    """The writer of a run's figures; only the first process writes.

    Args:
      workdir: folder of the run, which exists.
      steps: number of steps of the whole run.
      start: step that the run resumes from, 0 for a new one.
      launched: whether the state that it resumes from has launched.
      active: whether this process writes.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        steps: int,
        start: int,
        launched: bool,
        active: bool = True,
    ):
        self._path = workdir / METRICS
        self._active = active
        self._bar = None
        self._launch = (start, monotonic())  # the step and time of its beginning
        self._shown = self._launch[1]
        self.rows: list[dict[str, Any]] = []
        if not active:
            return
        self.rows = [
            row for row in read_lines(self._path) if _still_true(row, start, launched)
        ]
        write_lines(self._path, self.rows)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir), purge_step=start + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=steps, initial=start, unit="step", dynamic_ncols=True
            )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._active:
            self._file.close()
            self._board.close()
            if self._bar is not None:
                self._bar.close()

    def say(self, text: str) -> None:
        """Print one line, above the progress bar where there is one."""
        if self._active:
            tqdm.write(text, file=sys.stdout) if self._bar is not None else print(
                text, flush=True
            )

    def launch_begins(self, step: int) -> None:
        """Announce the pause for a launch after this many steps."""
        self.say(f"step {step:>6}  launch: ranking directions ...")
        self._launch = (step, monotonic())
        self._shown = self._launch[1]
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_description("launch")

    def launching(self, done: int, total: int) -> None:
        """Show the progress of the launch and an estimate of the time left.

        On the progress bar each time; without one, a line every few seconds.

        Args:
          done: number of matrices launched.
          total: number of all matrices.
        """
        if not self._active:
            return
        (step, begun), now = self._launch, monotonic()
        gone, left = now - begun, (now - begun) / max(done, 1) * (total - done)
        if self._bar is not None:
            clock = "<".join(tqdm.format_interval(int(x)) for x in (gone, left))
            self._bar.set_description(f"launch {done}/{total} matrices [{clock}]")
        elif now - self._shown >= LAUNCH_EVERY and done < total:
            self._shown = now
            self.say(
                f"step {step:>6}  launch     {done}/{total} matrices  "
                f"{gone:.0f} s, about {left:.0f} s left"
            )

    def launched(self, step: int, seconds: float) -> None:
        """Record and show how long a launch took."""
        self.log("launch", step, extract_seconds=seconds)
        self.say(f"step {step:>6}  launched in {seconds:.1f} s")
        if self._bar is not None:
            self._bar.set_description("dash")

    def log(self, kind: str, step: int, **figures: Any) -> None:
        """Record figures of one kind ("train", "eval", "launch") at a step."""
        if not self._active:
            return
        row = {"kind": kind, "step": step, **figures}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def train(self, step: int, phase: str, **figures: float) -> None:
        """Record and show one logged training step."""
        self.log("train", step, phase=phase, **figures)
        loss, speed = figures["loss"], figures["tokens_per_second"]
        if self._bar is not None:
            self._bar.set_description(phase, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
            self._bar.update(step - self._bar.n)
        else:
            self.say(
                f"step {step:>6}  {phase:<9}  loss {loss:.4f}  {speed:,.0f} tokens/s"
            )

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Record and show the figures of one evaluation."""
        self.log("eval", step, **figures)
        self.say(f"step {step:>6}  evaluation  {_figures(figures)}")

    def find(self, kind: str, step: int) -> dict[str, Any] | None:
        """Return the figures recorded under a kind at a step, or None."""
        for row in self.rows:
            if (row["kind"], row["step"]) == (kind, step):
                return {k: v for k, v in row.items() if k not in ("kind", "step")}
        return None


def _still_true(row: dict[str, Any], start: int, launched: bool) -> bool:
    """Return whether a row was written before the state that the run resumes from."""
    if row.get("kind") == "launch":
        return launched
    return row.get("step", start + 1) <= start


def _figures(figures: dict[str, float]) -> str:
    shown = (
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in figures.items()
    )
    return "  ".join(shown)
