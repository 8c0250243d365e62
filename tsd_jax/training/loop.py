"""The loop: steps, the launch at its step, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tsd_jax.core.errors import InputError
from tsd_jax.core.ranges import Count, Limit, check_ranges
from tsd_jax.training.auto_launch import AutoLaunchConfig, MonitorState
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.processes import stop_signals
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState


class Due(NamedTuple):
    """What is due after a step, in this order.

    Attributes:
      log: whether to log its figures.
      check: whether to check if directions have settled.
      evaluate: whether to evaluate.
      save: whether to save a checkpoint.
    """

    log: bool
    check: bool
    evaluate: bool
    save: bool


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The schedule of a run, in optimizer steps.

    Attributes:
      steps: number of steps of the whole run.
      launch_step: number of steps before launch, 0 for a launch before the first one;
        None for a method without launch, or with `auto_launch`.
      auto_launch: settings of automatic launch; None for a launch at `launch_step`.
      log_every: steps between logged figures; each one syncs host and device.
      eval_every: steps between evaluations; 0 for those before and after the run only.
      checkpoint_every: steps between checkpoints; 0 for one at the end only.
    """

    steps: Count
    launch_step: int | None
    auto_launch: AutoLaunchConfig | None = None
    log_every: Count = 10
    eval_every: Limit = 0
    checkpoint_every: Limit = 0

    def __post_init__(self):
        """Refuse a plan that cannot be carried out."""
        check_ranges(self)
        if self.launch_step is not None and not 0 <= self.launch_step < self.steps:
            raise InputError(
                f"launch_step {self.launch_step} must lie in [0, steps), and steps are "
                f"{self.steps}: launch earlier or train longer"
            )
        if self.auto_launch is None:
            return
        if self.launch_step is not None:
            raise InputError(
                "give either launch_step or auto_launch: a launch at a fixed step does "
                "not wait for directions to settle"
            )
        launch_max = self.auto_launch.launch_max
        if launch_max >= self.steps:
            raise InputError(
                f"auto_launch.launch_max {launch_max} must be less than the "
                f"{self.steps} steps: launch earlier or train longer"
            )

    def due(self, done: int, *, launched: bool, stopping: bool) -> Due:
        """Return what is due after a step.

        Args:
          done: number of steps taken.
          launched: whether launch has happened.
          stopping: whether the run was asked to stop here.
        """
        last = done == self.steps
        checked = self.auto_launch is not None and self.auto_launch.due(done)
        return Due(
            log=last or stopping or _is_due(done, self.log_every),
            check=checked and not (last or launched),
            evaluate=not last and _is_due(done, self.eval_every),
            save=last or stopping or _is_due(done, self.checkpoint_every),
        )

    def launches(self, step: int, monitor: MonitorState | None) -> bool:
        """Return whether to launch after a step, where launch has not happened.

        Args:
          step: number of steps taken.
          monitor: state of the direction monitor, with automatic launch.
        """
        if self.auto_launch is None or monitor is None:
            return step == self.launch_step
        return self.auto_launch.launches(step, int(monitor.streak))


@dataclass(frozen=True, kw_only=True)
class LoopCallbacks:
    """The functions that the loop calls; it knows neither model nor data.

    Attributes:
      step: jitted (state, params, batch, key) -> (state, metrics).
      launch: state -> (state, report).
      batch: step -> batch on its devices.
      evaluate: state -> {name: figure}.
      on_launch: report -> None; writes what launch saw.
      rates: {name: schedule} of learning rates, for the log.
      settle: state -> state after one more check of the directions.
    """

    step: Any
    launch: Callable
    batch: Callable[[int], Mapping[str, Any]]
    evaluate: Callable[[TrainState], dict[str, float]]
    on_launch: Callable[[Mapping[str, Any]], None]
    rates: Mapping[str, optax.Schedule]
    settle: Callable[[TrainState], TrainState] | None = None


class Stopwatch:
    """A stopwatch for the steps alone: no compilation, launch, evaluation or saving.

    Attributes:
      tokens: number of positions trained on so far, padding included.
      seconds: seconds of training so far.
      compile_seconds: seconds that the compilation of the step took.
    """

    def __init__(self):
        self.tokens, self.seconds, self.compile_seconds = 0, 0.0, 0.0
        self._lap_start = (0, 0.0)
        self._since = 0.0

    def go(self) -> None:
        """Start or continue."""
        self._since = time.perf_counter()

    def stop(self, pending: Any) -> None:
        """Pause once the device has computed some arrays.

        Args:
          pending: tree of these arrays.
        """
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
    """A signal ended the run, after a checkpoint."""


def _check_finite(done: int, metrics: Mapping[str, jax.Array]) -> None:
    """Refuse to log, save or launch a state whose loss or gradient is not finite."""
    for name, key in (("loss", "loss"), ("gradient's norm", "grad_norm")):
        if not math.isfinite(metrics[key]):
            raise InputError(
                f"the {name} is {float(metrics[key])} at step {done}: lower the "
                "learning rate or look at the data; the last checkpoint is intact"
            )


@dataclass(frozen=True)
class _Loop:
    """What happens between steps: launch, log, check, evaluation and checkpoint."""

    callbacks: LoopCallbacks
    recorder: Recorder
    checkpoints: Checkpoints
    watch: Stopwatch

    def launch(self, state: TrainState, step: int) -> TrainState:
        """Return the state after launch; record its time, and write what it saw."""
        self.recorder.launch_begins(step)
        begun = time.perf_counter()
        state, report = self.callbacks.launch(state)
        jax.block_until_ready((state, report))
        seconds = time.perf_counter() - begun
        self.callbacks.on_launch(report)
        self.recorder.launched(step, seconds)
        return state

    def after_step(
        self, state: TrainState, metrics: Mapping[str, jax.Array], done: int, due: Due
    ) -> TrainState:
        """Do what is due after a step, and return the state."""
        if due.log:
            self._log(done, metrics, launched=bool(state.launched))
        if due.check:
            state = self._settle(state, done)
        if due.evaluate:
            self.recorder.evaluation(done, self.callbacks.evaluate(state))
        if due.save:
            self.checkpoints.save(done, state)
        return state

    def _settle(self, state: TrainState, done: int) -> TrainState:
        """Check the directions once, and record the result."""
        assert self.callbacks.settle is not None
        state = self.callbacks.settle(state)
        seen = state.monitor
        # The first check has nothing to compare with.
        figures = {"overlap": float(seen.overlap)} if int(seen.checks) > 1 else {}
        self.recorder.log("settling", done, **figures, streak=int(seen.streak))
        return state

    def _log(
        self, done: int, metrics: Mapping[str, jax.Array], *, launched: bool
    ) -> None:
        """Record one step."""
        figures = {name: float(value) for name, value in metrics.items()}
        # The schedules count from 0: this step used the rate of the one before.
        rates = {
            name: float(np.asarray(rate(done - 1)))
            for name, rate in self.callbacks.rates.items()
        }
        phase, speed = "dash" if launched else "prelaunch", self.watch.lap()
        self.recorder.train(done, phase, **figures, **rates, tokens_per_second=speed)


def run(
    state: TrainState,
    params: Mapping[str, Any],
    key: jax.Array,
    callbacks: LoopCallbacks,
    config: LoopConfig,
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Stopwatch]:
    """Train from `state.step` to the last step.

    The step is compiled once, ahead of time, and that executable takes every step.

    Args:
      state: state of a new or a resumed run.
      params: the base's tree.
      key: dropout key.
      callbacks: functions to call.
      config: when to call them.
      recorder: writer of the figures.
      checkpoints: where states are saved.

    Returns:
      The last state, and the stopwatch over the steps taken here.

    Raises:
      StopRequested: SIGINT or SIGTERM arrived; the state is saved.
      InputError: the loss or its gradient is no longer finite.
    """
    start, watch, launched = int(state.step), Stopwatch(), bool(state.launched)
    if start == config.steps:
        return state, watch
    loop = _Loop(callbacks, recorder, checkpoints, watch)
    begun, batch = time.perf_counter(), callbacks.batch(start)
    step_fn = callbacks.step.lower(state, params, batch, key).compile()
    watch.compile_seconds = time.perf_counter() - begun
    positions = jax.tree.leaves(batch)[0].size
    metrics: Mapping[str, jax.Array] = {}
    watch.go()
    with stop_signals() as stop_asked:
        for done in range(start + 1, config.steps + 1):
            if not launched and config.launches(done - 1, state.monitor):
                watch.stop(state)
                if metrics:  # Init would drop what is wrong, after ranking by it.
                    _check_finite(done - 1, metrics)
                state, launched = loop.launch(state, done - 1), True
                watch.go()
            state, metrics = step_fn(state, params, callbacks.batch(done - 1), key)
            watch.tokens += positions
            stopping = stop_asked(done)
            due = config.due(done, launched=launched, stopping=stopping)
            if not any(due):
                continue
            watch.stop(metrics)
            _check_finite(done, metrics)
            state = loop.after_step(state, metrics, done, due)
            if stopping and done < config.steps:
                raise StopRequested(f"stopped by a signal after step {done}")
            watch.go()
    return state, watch
