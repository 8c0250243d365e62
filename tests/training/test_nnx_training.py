"""An NNX model in the library's trainer, beside the equations in float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tsd_jax as tsd
from tests.helpers.mlp import (
    CLASSES,
    HIDDEN,
    PATHS,
    RULES,
    TOKENS,
    WIDTH,
    Mlp,
    mlp_batch,
    mlp_params,
)
from tests.helpers.reference import Layer, Network, linear_schedule
from tests.helpers.reference_run import (
    CLIP,
    DECAY,
    GAIN_PEAK,
    GAMMAS,
    PEAK,
    WARMUP,
    reference_optimizer,
)
from tsd_jax.binding.linen import adapted, bind_variables
from tsd_jax.core import paths
from tsd_jax.core.adapter import delta
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.gradient_discovery import KernelGradients
from tsd_jax.training.loop import LoopCallbacks, LoopConfig, run
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import launch_state, make_train_step

ROOT = Path(__file__).resolve().parents[2]
STEPS, LAUNCH = 10, 4
TOKEN = jnp.zeros((1, 1), jnp.int32)
CONFIG = LoopConfig(
    steps=STEPS, launch_step=LAUNCH, log_every=1, checkpoint_every=2, eval_every=0
)
LOSS = next_token_loss(lambda model, tokens: model(tokens))


class NnxMlp(nnx.Module):
    """The same function as `Mlp`, and the same paths of parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        return self.down(jnp.tanh(self.up(self.embed(tokens))))


@functools.cache
def problem() -> tuple[Any, ...]:
    """Make the model, its parameters, its spec and an optimizer."""
    model = NnxMlp(nnx.Rngs(0))
    known: Any = nnx.state(model, nnx.Param)
    for path, value in paths.flatten(mlp_params()).items():
        module, name = path.split("/")
        known[module][name].set_value(value)
    nnx.update(model, known)
    spec = tsd.nnx.make_spec(model, RULES, TOKEN, method="tsd")
    optimizer = reference_optimizer(STEPS)
    return model, tsd.nnx.params(model), spec, optimizer


@functools.cache
def loop_callbacks() -> LoopCallbacks:
    """Build what the loop calls, once: the step is compiled by every run anew."""
    model, params, spec, optimizer = problem()
    return LoopCallbacks(
        step=make_train_step(LOSS, tsd.nnx.make_bind(model), optimizer),
        launch=lambda state: launch_state(state, params, spec),
        batch=mlp_batch,
        evaluate=lambda state: {},
        on_launch=lambda report: None,
        rates={},
    )


def start() -> TrainState:
    *_, spec, optimizer = problem()
    return create_state(jax.random.key(0), spec, optimizer)


def go(workdir: Path, batch: Callable[[int], Any] = mlp_batch) -> TrainState:
    """Start a run, or go on from its newest checkpoint."""
    params = problem()[1]
    with Checkpoints(workdir / "checkpoints") as saved:
        state = start() if saved.latest is None else saved.restore(start())
        begun, launched = int(state.step), bool(state.launched)
        with Recorder(workdir, steps=STEPS, start=begun, launched=launched) as log:
            callbacks = dataclasses.replace(loop_callbacks(), batch=batch)
            key = jax.random.key(0)
            return run(state, params, key, callbacks, CONFIG, log, saved)[0]


@functools.cache
def reference() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Train by the equations: (loss, norm) of every step, and dK at the end."""
    params, adapters = mlp_params(), start().trainable.adapters
    layers = {}
    for path, rule in zip(PATHS, RULES, strict=True):
        module = params[path.split("/")[0]]
        layers[path] = Layer(
            module["kernel"],
            module["bias"],
            adapters[path].a,
            gamma=GAMMAS[path],
            s=rule.directions,
        )
    network = Network(params["embed"]["embedding"], *layers.values())
    figures = []
    for n in range(STEPS):
        if n == LAUNCH:
            for layer in layers.values():
                layer.launch(gains=True, restart=True, keep=False)
        rate, gain_rate = (
            linear_schedule(n, peak, WARMUP, STEPS) for peak in (PEAK, GAIN_PEAK)
        )
        rates = {"a": rate, "b": rate, "g": gain_rate}
        figures.append(network.step(mlp_batch(n), rates, clip=CLIP, decay=DECAY))
    return np.array(figures), {path: layer.delta for path, layer in layers.items()}


class Crash(Exception):  # noqa: N818
    """What a run is interrupted by."""


@pytest.mark.parametrize("crash", [None, 3, 7], ids=["whole", "before", "after"])
def test_an_nnx_model_trains_by_the_equations(tmp_path, crash):
    """Also where it resumes from a checkpoint, before launch and after it."""

    def crashing(step: int) -> Any:
        if step == crash:
            raise Crash
        return mlp_batch(step)

    if crash is not None:
        with pytest.raises(Crash):
            go(tmp_path, crashing)
    state = go(tmp_path)
    assert (int(state.step), bool(state.launched)) == (STEPS, True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    figures, deltas = reference()
    got = [(row["loss"], row["grad_norm"]) for row in steps]
    np.testing.assert_allclose(got, figures, rtol=3e-6)
    for path, want in deltas.items():
        adapter = state.trainable.adapters[path]
        ours = delta(adapter, state.directions[path])
        assert np.linalg.norm(np.asarray(ours) - want) < 3e-6
        assert (np.asarray(adapter.gain) != 0).all()


def test_an_nnx_models_gradients_are_those_of_its_linen_twin():
    """Directions without pre-launch ask for dL/dK, by the same binding."""
    model, params, spec, _ = problem()
    batches = [mlp_batch(0), mlp_batch(1)]
    ours = KernelGradients(
        LOSS, tsd.nnx.make_bind(model), start(), params, spec, batches
    )
    linen = next_token_loss(adapted(Mlp().apply))
    variables = {"params": mlp_params()}
    twin = tsd.make_spec(Mlp().apply, variables, RULES, TOKEN, method="tsd")
    state = create_state(jax.random.key(0), twin, reference_optimizer(STEPS))
    theirs = KernelGradients(linen, bind_variables, state, mlp_params(), twin, batches)
    assert set(ours) == set(theirs) == set(PATHS)
    for path in PATHS:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6)


def test_the_example_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples/nnx_training.py"), str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True
    )
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert "launched in" in done.stdout
