"""The loop: steps, the launch at its step, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from tsd_jax.core.errors import InputError
from tsd_jax.training.auto_launch import AutoLaunchConfig, MonitorState
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.processes import stop_signals
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Say when things happen; in optimizer steps.

    Attributes:
      steps: of the whole run.
      launch_step: steps before launch, 0 for a launch before the first; None for a
        method without one, or where `auto_launch` decides.
      auto_launch: when to launch by what the directions do; None for `launch_step`.
      log_every: a figure, a sync of host and device.
      eval_every: 0 for evaluation before and after only.
      checkpoint_every: 0 for the end only.
    """

    steps: int
    launch_step: int | None
    auto_launch: AutoLaunchConfig | None = None
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self):
        """Refuse a plan that cannot be carried out."""
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")
        if self.log_every < 1:
            raise InputError(f"log_every must be at least 1, not {self.log_every}")
        if self.launch_step is not None and not 0 <= self.launch_step < self.steps:
            raise InputError(
                f"launch_step {self.launch_step} must lie in [0, steps), and steps are "
                f"{self.steps}: launch earlier or train longer"
            )
        if self.auto_launch is None:
            return
        if self.launch_step is not None:
            raise InputError("a launch at a fixed step leaves nothing to settle")
        if self.auto_launch.launch_max >= self.steps:
            raise InputError(
                f"auto_launch.launch_max {self.auto_launch.launch_max} must be less than the "
                f"{self.steps} steps: launch earlier or train longer"
            )

    def settles(self, done: int) -> bool:
        """Return whether directions are checked after this many steps."""
        return self.auto_launch is not None and self.auto_launch.due(done)

    def launches(self, step: int, monitor: MonitorState | None) -> bool:
        """Return whether to launch after this many steps, if it is not done yet."""
        if self.auto_launch is None or monitor is None:
            return step == self.launch_step
        return self.auto_launch.launches(step, int(monitor.streak))


@dataclass(frozen=True, kw_only=True)
class LoopCallbacks:
    """Name what the loop calls; it knows neither model nor data.

    Attributes:
      step: jitted (state, params, batch, key) -> (state, metrics).
      launch: state -> (state, report).
      batch: step -> placed batch.
      evaluate: state -> {name: figure}.
      on_launch: report -> None; writes what launch saw.
      rates: {name: schedule} of learning rates, for the log.
      settle: state -> state with one more check of the directions.
    """

    step: Any
    launch: Callable
    batch: Callable[[int], Mapping[str, Any]]
    evaluate: Callable[[TrainState], dict[str, float]]
    on_launch: Callable[[Mapping[str, Any]], None]
    rates: Mapping[str, optax.Schedule]
    settle: Callable[[TrainState], TrainState] | None = None


class Stopwatch:
    """Time the steps alone: no compilation, launch, evaluation or saving.

    Attributes:
      tokens: positions trained on so far, padding included.
      seconds: of training so far.
      compile_seconds: of compiling the step.
    """

    def __init__(self):
        self.tokens, self.seconds, self.compile_seconds = 0, 0.0, 0.0
        self._lap_start = (0, 0.0)
        self._since = 0.0

    def go(self) -> None:
        """Start or go on."""
        self._since = time.perf_counter()

    def stop(self, pending: Any) -> None:
        """Wait until the device has computed `pending`, and hold the watch."""
        jax.block_until_ready(pending)
        self.seconds += time.perf_counter() - self._since

    def lap(self) -> float:
        """Return tokens per second since the last lap."""
        tokens, seconds = self._lap_start
        self._lap_start = (self.tokens, self.seconds)
        return (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all steps timed."""
        return self.tokens / self.seconds if self.seconds else 0.0


class StopRequested(Exception):  # noqa: N818 - no error
    """Tell that a signal ended the run, after a checkpoint."""


def _launch(
    state: TrainState, parts: LoopCallbacks, recorder: Recorder, step: int
) -> TrainState:
    """Launch between two steps, say how long it took, and write what it saw."""
    recorder.launch_begins(step)
    begun = time.perf_counter()
    state, report = parts.launch(state)
    jax.block_until_ready((state, report))
    seconds = time.perf_counter() - begun
    parts.on_launch(report)
    recorder.launched(step, seconds)
    return state


def _check_finite(done: int, metrics: Mapping[str, jax.Array]) -> None:
    """Refuse to log, to save or to launch what is no longer a number."""
    for name, key in (("loss", "loss"), ("gradient's norm", "grad_norm")):
        if not math.isfinite(metrics[key]):
            raise InputError(
                f"the {name} is {float(metrics[key])} at step {done}: lower the "
                "learning rate or look at the data; the last checkpoint is intact"
            )


def _settle(
    state: TrainState, parts: LoopCallbacks, recorder: Recorder, done: int
) -> TrainState:
    """Check the directions once, and record what came of it."""
    assert parts.settle is not None
    state = parts.settle(state)
    seen = state.monitor
    # The first check has nothing to compare with.
    figures = {"overlap": float(seen.overlap)} if int(seen.checks) > 1 else {}
    recorder.log("settling", done, **figures, streak=int(seen.streak))
    return state


def _log(
    done: int,
    metrics: Mapping[str, jax.Array],
    parts: LoopCallbacks,
    launched: bool,
    recorder: Recorder,
    speed: float,
) -> None:
    """Record one step."""
    figures = {name: float(value) for name, value in metrics.items()}
    # The schedules count from 0: this step used the rate of the one before.
    rates = {
        name: float(np.asarray(rate(done - 1))) for name, rate in parts.rates.items()
    }
    phase = "dash" if launched else "prelaunch"
    recorder.train(done, phase, **figures, **rates, tokens_per_second=speed)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def run(
    state: TrainState,
    params: Mapping[str, Any],
    key: jax.Array,
    parts: LoopCallbacks,
    config: LoopConfig,
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Stopwatch]:
    """Train from `state.step` to the last step.

    The step is compiled once, ahead of time, and that one executable is called to
    the end.

    Args:
      state: new or restored. params: the base.
      key: for dropout.
      parts: what to call. config: when.
      recorder: where figures go. checkpoints: where states go.

    Returns:
      The last state, and the watch over the steps taken here.

    Raises:
      StopRequested: SIGINT or SIGTERM came; the state is saved.
      InputError: the loss or its gradient is no longer finite.
    """
    start, watch, launched = int(state.step), Stopwatch(), bool(state.launched)
    if start == config.steps:
        return state, watch
    begun = time.perf_counter()
    batch = parts.batch(start)
    step_fn = parts.step.lower(state, params, batch, key).compile()
    watch.compile_seconds = time.perf_counter() - begun
    positions = jax.tree.leaves(batch)[0].size
    metrics: Mapping[str, jax.Array] = {}
    watch.go()
    with stop_signals() as stop_asked:
        for step in range(start, config.steps):
            if not launched and config.launches(step, state.monitor):
                watch.stop(state)
                if metrics:  # Init would start afresh from whatever was ranked.
                    _check_finite(step, metrics)
                state, launched = _launch(state, parts, recorder, step), True
                watch.go()
            state, metrics = step_fn(state, params, parts.batch(step), key)
            watch.tokens += positions
            done, last = step + 1, step + 1 == config.steps
            stopping = stop_asked(done)
            logging = last or stopping or _due(done, config.log_every)
            evaluating = not last and _due(done, config.eval_every)
            saving = last or stopping or _due(done, config.checkpoint_every)
            checking = not (last or launched) and config.settles(done)
            if not (logging or evaluating or saving or checking):
                continue
            watch.stop(metrics)
            _check_finite(done, metrics)
            if logging:
                _log(done, metrics, parts, launched, recorder, watch.lap())
            if checking:
                state = _settle(state, parts, recorder, done)
            if evaluating:
                recorder.evaluation(done, parts.evaluate(state))
            if saving:
                checkpoints.save(done, state)
            if stopping and not last:
                raise StopRequested(f"stopped by a signal after step {done}")
            watch.go()
    return state, watch
