"""The loop with real callbacks: whole, cut off anywhere, stopped, and failing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.mlp import RULES, Mlp, mlp_batch, mlp_params
from tsd_jax.binding.linen import adapted, bind_variables, make_spec
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.paths import select
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.training.auto_launch import AutoLaunchConfig, DirectionMonitor
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.loop import LoopCallbacks, LoopConfig, StopRequested, run
from tsd_jax.training.optimizer import make_optimizer, make_schedule
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import LossFn, launch_state, make_train_step

STEPS, LAUNCH = 10, 5
CONFIG = LoopConfig(
    steps=STEPS, launch_step=LAUNCH, log_every=1, eval_every=4, checkpoint_every=3
)
RATES = {
    "learning_rate": make_schedule(0.02, steps=STEPS, warmup=2),
    "gain_learning_rate": make_schedule(0.05, steps=STEPS, warmup=2),
}


class Setup(NamedTuple):
    """What all runs share; the state before the first step, as NumPy arrays."""

    params: Any
    start: TrainState
    callbacks: LoopCallbacks


def build(auto_launch: AutoLaunchConfig | None = None) -> Setup:
    """Build LoRA-TSD with dropout and two full parameters.

    Its step may be traced once by all tests.
    """
    params = jax.device_put(mlp_params(), jax.devices()[0])
    rules = [dataclasses.replace(rule, dropout=0.2) for rule in RULES]
    rules += [Full(pattern="down/bias"), Full(pattern="embed/.*", rows=(2, 5))]
    tokens = jnp.zeros((1, 1), jnp.int32)
    spec = make_spec(Mlp().apply, {"params": params}, rules, tokens, method="tsd")
    optimizer = make_optimizer(*RATES.values(), clip_norm=0.3)
    create = functools.partial(
        create_state, spec=spec, optimizer=optimizer, auto_launch=auto_launch
    )
    monitor = (
        None if auto_launch is None else DirectionMonitor(params, spec, auto_launch)
    )

    def settle(state: TrainState) -> TrainState:
        assert monitor is not None
        return state.replace(monitor=monitor(state.monitor, state.trainable))

    def launch(state: TrainState):
        # At the start nothing has been learned that directions could be ranked by.
        first = {path: jnp.flip(x) for path, x in select(params, spec.paths).items()}
        deltas = None if int(state.step) else first
        return launch_state(state, params, spec, deltas=deltas)

    chex.clear_trace_counter()  # it tells functions apart by their source
    loss_fn = chex.assert_max_traces(next_token_loss(adapted(Mlp().apply)), n=1)
    callbacks = LoopCallbacks(
        step=make_train_step(
            cast(LossFn, loss_fn), bind_variables, optimizer, dropout=True
        ),
        launch=launch,
        batch=mlp_batch,
        evaluate=lambda state: {"seen": int(state.step)},
        on_launch=lambda report: None,
        rates=RATES,
        settle=settle,
    )
    start = jax.jit(create)(jax.random.key(0), params=params)
    return Setup(params, jax.tree.map(np.asarray, start), callbacks)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return build()


def go(
    workdir: Path,
    setup: Setup,
    config: LoopConfig = CONFIG,
    batch: Callable[[int], Any] = mlp_batch,
) -> TrainState:
    """Start a run, or go on with the one that lies in the workdir."""
    first = jax.tree.map(jnp.array, setup.start)
    first = jax.device_put(first, jax.devices()[0])
    callbacks = dataclasses.replace(setup.callbacks, batch=batch)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = first if checkpoints.latest is None else checkpoints.restore(first)
        with Recorder(
            workdir,
            steps=config.steps,
            start=int(state.step),
            launched=bool(state.launched),
        ) as recorder:
            state, _ = run(
                state,
                setup.params,
                jax.random.key(1),
                callbacks,
                config,
                recorder,
                checkpoints,
            )
    return jax.tree.map(np.asarray, state)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Read what was logged, but for timings."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timings = ("tokens_per_second", "extract_seconds")
    return [
        {key: value for key, value in json.loads(line).items() if key not in timings}
        for line in lines
    ]


def kept(workdir: Path) -> list[int]:
    """Return the steps of the checkpoints that lie there."""
    names = (path.name for path in (workdir / "checkpoints").iterdir())
    return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory) -> tuple[TrainState, list[dict[str, Any]]]:
    """Run from the first to the last step."""
    workdir = tmp_path_factory.mktemp("whole")
    return go(workdir, setup), rows(workdir)


def neighbours(log: list[dict[str, Any]], kind: str) -> tuple[dict, dict]:
    at = [row["kind"] for row in log].index(kind)
    return log[at - 1], log[at + 1]


def test_log(whole):
    """Each step once, with the phase and the learning rates it was taken with."""
    steps = [row for row in whole[1] if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    phases = [row["phase"] for row in steps]
    assert phases == ["prelaunch"] * LAUNCH + ["dash"] * (STEPS - LAUNCH)
    rates = np.array([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    for name, peak in (("learning_rate", 0.02), ("gain_learning_rate", 0.05)):
        logged = [row[name] for row in steps]
        np.testing.assert_allclose(logged, peak * rates, rtol=1e-6)
    assert {row["targets"] for row in steps} == {24 + 12}
    others = [(r["kind"], r["step"]) for r in whole[1] if r["kind"] != "train"]
    assert others == [("eval", 4), ("launch", LAUNCH), ("eval", 8)]
    assert [row["seen"] for row in whole[1] if row["kind"] == "eval"] == [4, 8]
    before, after = (row["step"] for row in neighbours(whole[1], "launch"))
    assert (before, after) == (LAUNCH, LAUNCH + 1)


def test_launch_happens_between_two_steps(whole, setup):
    """The state has launched, gains train, and the optimizer's schedules went on."""
    state = whole[0]
    assert state.step == STEPS
    assert state.launched
    for path, part in state.trainable.full.items():
        assert (part.value != setup.start.trainable.full[path].value).all()
    for path, adapter in state.trainable.adapters.items():
        assert (adapter.gain != 0).all()
        assert np.abs(state.directions[path].left).sum() > 0
        assert not np.array_equal(adapter.a, setup.start.trainable.adapters[path].a)


class Crash(Exception):  # noqa: N818
    """End a run as a power cut does: nothing is saved."""


def crash_at(step: int) -> Callable[[int], Any]:
    def batch(n: int):
        if n == step:
            raise Crash
        return mlp_batch(n)

    return batch


def stop_at(step: int) -> Callable[[int], Any]:
    """Send SIGTERM while the batch of the step before is read."""

    def batch(n: int):
        if n == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return mlp_batch(n)

    return batch


def assert_equal(got: TrainState, want: TrainState) -> None:
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
    "step",
    [2, LAUNCH, LAUNCH + 1, STEPS - 1],
    ids=["before launch", "at launch", "right after launch", "before the last step"],
)
def test_stopped_and_resumed_is_whole(whole, setup, tmp_path, step):
    """Bit for bit: adapters, directions, moments, and every logged figure."""
    with pytest.raises(StopRequested, match=f"signal after step {step}$"):
        go(tmp_path, setup, batch=stop_at(step))
    assert kept(tmp_path)[-1] == step
    assert rows(tmp_path)[-1]["step"] == step
    assert_equal(go(tmp_path, setup), whole[0])
    assert rows(tmp_path) == whole[1]


@pytest.mark.parametrize("every", [3, LAUNCH], ids=["before", "at"])
def test_crashed_and_resumed_is_whole(whole, setup, tmp_path, every):
    """A launch after the last checkpoint is done, and logged, once more."""
    config = dataclasses.replace(CONFIG, checkpoint_every=every)
    with pytest.raises(Crash):
        go(tmp_path, setup, config, crash_at(LAUNCH + 1 if every == LAUNCH else 5))
    assert kept(tmp_path) == [every]
    assert rows(tmp_path)[-1]["step"] > every
    assert_equal(go(tmp_path, setup, config), whole[0])
    assert rows(tmp_path) == whole[1]


def test_a_finished_run_is_left_alone(whole, setup, tmp_path):
    go(tmp_path, setup)
    again = go(tmp_path, setup, batch=crash_at(STEPS))
    assert_equal(again, whole[0])
    assert rows(tmp_path) == whole[1]


def test_a_stop_during_the_last_step_finishes(whole, setup, tmp_path):
    assert_equal(go(tmp_path, setup, batch=stop_at(STEPS)), whole[0])
    assert kept(tmp_path)[-1] == STEPS


def poisoned(step: int, weight: float) -> Callable[[int], Any]:
    """Make the loss of one step no number, or its gradient alone."""

    def batch(n: int):
        arrays = mlp_batch(n)
        if n == step - 1:
            arrays["weights"] = arrays["weights"] * np.float32(weight)
        return arrays

    return batch


@pytest.mark.parametrize(
    ("step", "log_every", "said"),
    [(4, 1, 4), (4, 100, 5), (6, 100, 6)],
    ids=["logged", "before launch", "before a checkpoint"],
)
def test_a_loss_that_is_no_number_ends_the_run(
    whole, setup, tmp_path, step, log_every, said
):
    """Logged or not, a state that came of it is neither launched nor saved."""
    config = dataclasses.replace(CONFIG, log_every=log_every, eval_every=0)
    with pytest.raises(InputError, match=rf"loss is nan at step {said}: .* is intact"):
        go(tmp_path, setup, config, poisoned(step, np.nan))
    assert kept(tmp_path) == [3]
    assert_equal(go(tmp_path, setup), whole[0])


def test_a_gradient_that_is_no_number_ends_the_run(setup, tmp_path):
    """The loss of that step may be sound, what it leaves behind is not."""

    def step(state, params, batch, key):
        state, metrics = setup.callbacks.step(state, params, batch, key)
        overflown = jnp.where(state.step == 2, jnp.inf, metrics["grad_norm"])
        return state, {**metrics, "grad_norm": overflown}

    callbacks = dataclasses.replace(setup.callbacks, step=jax.jit(step))
    with pytest.raises(InputError, match="gradient's norm is inf at step 2"):
        go(tmp_path, setup._replace(callbacks=callbacks))
    assert kept(tmp_path) == []


def test_logs_are_kept_apart_from_steps(whole, setup, tmp_path):
    """What is logged, evaluated or saved, and when, changes no state."""
    plan = LoopConfig(steps=STEPS, launch_step=LAUNCH, log_every=4)
    assert_equal(go(tmp_path, setup, plan), whole[0])
    want = [r for r in whole[1] if r["kind"] == "train" and r["step"] in (4, 8, 10)]
    assert [r for r in rows(tmp_path) if r["kind"] == "train"] == want
    assert kept(tmp_path) == [STEPS]


def test_a_launch_before_the_first_step(setup, tmp_path):
    """Stopped and gone on with, too: the launch is not done again."""
    config = dataclasses.replace(CONFIG, launch_step=0)
    with pytest.raises(StopRequested):
        go(tmp_path / "cut", setup, config, stop_at(2))
    state = go(tmp_path / "cut", setup, config)
    assert_equal(state, go(tmp_path / "whole", setup, config))
    log = rows(tmp_path / "cut")
    assert (log[0]["kind"], log[0]["step"]) == ("launch", 0)
    assert [row["kind"] for row in log].count("launch") == 1
    assert {row["phase"] for row in log if row["kind"] == "train"} == {"dash"}
    assert state.launched


SETTLING = AutoLaunchConfig(
    launch_min=3, launch_max=8, every=2, threshold=0.7, patience=1, matrices=4
)
AUTO = dataclasses.replace(CONFIG, launch_step=None, auto_launch=SETTLING)


@pytest.fixture(scope="module")
def settling_setup() -> Setup:
    return build(SETTLING)


@pytest.fixture(scope="module")
def settled(settling_setup, tmp_path_factory):
    """Launch when the directions have settled."""
    workdir = tmp_path_factory.mktemp("settled")
    return go(workdir, settling_setup, AUTO), rows(workdir)


def launch_of(log: list[dict[str, Any]]) -> int:
    (step,) = (row["step"] for row in log if row["kind"] == "launch")
    return step


def test_it_launches_once_directions_have_settled(settled):
    """The first check that reaches the threshold, and none after it."""
    state, log = settled
    checks = [row for row in log if row["kind"] == "settling"]
    steps = [row["step"] for row in checks]
    assert steps == list(range(2, launch_of(log) + 1, 2))
    assert "overlap" not in checks[0]
    assert all(row["overlap"] < 0.7 for row in checks[1:-1])
    assert checks[-1]["overlap"] >= 0.7
    assert [row["streak"] for row in checks] == [0] * (len(checks) - 1) + [1]
    assert 2 < launch_of(log) < 8, "settled by itself"
    phases = [row["phase"] for row in log if row["kind"] == "train"]
    before = launch_of(log)
    assert phases == ["prelaunch"] * before + ["dash"] * (STEPS - before)
    assert (state.launched, state.monitor.checks) == (True, len(checks))


@pytest.mark.parametrize("step", range(2, STEPS))
def test_the_decision_is_the_same_wherever_the_run_is_cut(
    settled, settling_setup, tmp_path, step
):
    with pytest.raises(StopRequested):
        go(tmp_path, settling_setup, AUTO, stop_at(step))
    assert_equal(go(tmp_path, settling_setup, AUTO), settled[0])
    assert rows(tmp_path) == settled[1]


def test_a_crash_forgets_checks_after_the_last_checkpoint(
    settled, settling_setup, tmp_path
):
    with pytest.raises(Crash):
        go(tmp_path, settling_setup, AUTO, crash_at(5))
    assert kept(tmp_path) == [3]
    assert_equal(go(tmp_path, settling_setup, AUTO), settled[0])
    assert rows(tmp_path) == settled[1]


@pytest.mark.parametrize(
    ("bounds", "step"),
    [({"threshold": 1.0, "patience": 3}, 8), ({"threshold": 0.01, "launch_min": 7}, 7)],
    ids=["never settled", "settled early"],
)
def test_a_launch_is_bounded_on_both_sides(settling_setup, tmp_path, bounds, step):
    bounded = dataclasses.replace(SETTLING, **bounds)
    go(tmp_path, settling_setup, dataclasses.replace(AUTO, auto_launch=bounded))
    assert launch_of(rows(tmp_path)) == step


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"steps": 0, "launch_step": None},
            "steps must be a whole number of at least 1",
        ),
        ({"steps": 5, "launch_step": 5}, "steps are 5: launch earlier or train longer"),
        ({"steps": 5, "launch_step": -1}, r"launch_step -1 must lie in \[0, steps\)"),
        (
            {"steps": 9, "launch_step": 1, "auto_launch": SETTLING},
            "either launch_step",
        ),
        (
            {"steps": 8, "launch_step": None, "auto_launch": SETTLING},
            "launch_max 8 must be less than the 8 steps",
        ),
        ({"steps": 5, "launch_step": 1, "log_every": 0}, "log_every .* not 0"),
    ],
)
def test_plans_that_cannot_be_carried_out(plan, message):
    with pytest.raises(InputError, match=message):
        LoopConfig(**plan)
