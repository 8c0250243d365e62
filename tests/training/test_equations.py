"""Whole runs of every method, step by step, against the equations in NumPy.

Compared is what does not depend on the signs of singular vectors: loss, gradient norm,
the kernels' change, the gains, and what the launch saw.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.mlp import PATHS, RULES, Mlp, mlp_batch, mlp_params, mlp_spec
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
from tests.helpers.trees import method_of
from tsd_jax.binding.linen import adapted, bind_variables
from tsd_jax.core.adapter import Adapter, Directions
from tsd_jax.core.spec import Spec
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import LossFn, launch_state, make_train_step

METHODS = ["lora", "dash", "init", "tsd", "init+keep", "tsd+keep"]
STEPS, LAUNCH = 13, 6


class Trace(NamedTuple):
    """One run: figures of every step, and states before, at and after launch.

    loss, norm: (steps,). deltas, gains: {path: array after each step, and, one more
    entry after the first LAUNCH, right after launch}. seen: {path: (indices, sigma,
    rates)}, empty without launch.
    """

    loss: np.ndarray
    norm: np.ndarray
    deltas: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    seen: dict[str, tuple[np.ndarray, ...]]


def collect(figures: list, layers: list, seen: dict) -> Trace:
    loss, norm = np.array(figures, np.float64).T
    deltas, gains = (
        {path: np.array([at[path][n] for at in layers]) for path in PATHS}
        for n in (0, 1)
    )
    return Trace(loss, norm, deltas, gains, seen)


class Problem(NamedTuple):
    """What both runs share; the state before the first step, as NumPy arrays."""

    params: dict
    spec: Spec
    optimizer: optax.GradientTransformation
    state: TrainState


@functools.cache
def problem(method: str) -> Problem:
    params = mlp_params()
    spec = mlp_spec(params, method)
    optimizer = reference_optimizer(STEPS)
    create = functools.partial(create_state, spec=spec, optimizer=optimizer)
    state = jax.jit(create)(jax.random.key(0))
    return Problem(params, spec, optimizer, jax.tree.map(np.asarray, state))


def change(adapter: Adapter, frozen: Directions) -> np.ndarray:
    """Return gamma A B + L diag(g + o) R^T."""
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b)
    total = adapter.kernel.scale * (a @ b)
    if frozen.left is None:
        return total
    coordinates = np.array(frozen.offset)
    if adapter.gain is not None:
        coordinates[: len(adapter.gain)] += np.asarray(adapter.gain)
    return total + (np.asarray(frozen.left) * coordinates) @ np.asarray(frozen.right).T


@functools.cache
def library_run(method: str) -> Trace:
    params, spec, optimizer, start = problem(method)
    state = jax.tree.map(jnp.array, start)  # a copy, for the step takes it
    chex.clear_trace_counter()  # it tells functions apart by their source
    loss_fn = chex.assert_max_traces(next_token_loss(adapted(Mlp().apply)), n=1)
    step = make_train_step(cast(LossFn, loss_fn), bind_variables, optimizer)

    def layers():
        return {
            path: (
                change(adapter, state.directions[path]),
                np.zeros(0) if adapter.gain is None else np.asarray(adapter.gain),
            )
            for path, adapter in state.trainable.adapters.items()
        }

    figures, states, seen = [], [], {}
    for n in range(STEPS):
        if n == LAUNCH and spec.method.launches:
            state, report = launch_state(state, params, spec)
            states.append(layers())
            seen = {
                path: (ranking.indices, ranking.sigma, ranking.rates)
                for path, ranking in report.items()
            }
        state, metrics = step(state, params, mlp_batch(n), jax.random.key(0))
        figures.append((metrics["loss"], metrics["grad_norm"]))
        states.append(layers())
    return collect(figures, states, seen)


@functools.cache
def reference_run(method: str) -> Trace:
    params, _, _, start = problem(method)
    how = method_of(method)
    up, down = (
        Layer(
            params[path.split("/")[0]]["kernel"],
            params[path.split("/")[0]]["bias"],
            start.trainable.adapters[path].a,
            gamma=GAMMAS[path],
            s=rule.directions * how.gains,
        )
        for path, rule in zip(PATHS, RULES, strict=True)
    )
    network = Network(params["embed"]["embedding"], up, down)

    def layers():
        pairs = zip(PATHS, (up, down), strict=True)
        return {path: (layer.delta, layer.trained["g"]) for path, layer in pairs}

    figures, states, seen = [], [], {}
    for n in range(STEPS):
        if n == LAUNCH and method != "lora":
            for path, layer in zip(PATHS, (up, down), strict=True):
                seen[path] = layer.launch(
                    gains=how.gains, restart=how.restart, keep=how.keep
                )
            states.append(layers())
        rates = [linear_schedule(n, p, WARMUP, STEPS) for p in (PEAK, GAIN_PEAK)]
        rates = {"a": rates[0], "b": rates[0], "g": rates[1]}
        figures.append(network.step(mlp_batch(n), rates, clip=CLIP, decay=DECAY))
        states.append(layers())
    return collect(figures, states, seen)


@pytest.mark.parametrize("method", METHODS)
def test_every_step_equals_the_equations(method):
    """To the rounding of float32; the kernels change by 0.05 to 0.7.

    The step is traced once, launch or not.
    """
    got, want = library_run(method), reference_run(method)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-6)
    np.testing.assert_allclose(got.norm, want.norm, rtol=2e-6)
    for path in PATHS:
        distance = np.linalg.norm(got.deltas[path] - want.deltas[path], axis=(1, 2))
        assert distance.max() < 2e-6
        np.testing.assert_allclose(got.gains[path], want.gains[path], atol=1e-6)


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_is_launched_equals_the_equations(method):
    got, want = library_run(method).seen, reference_run(method).seen
    for kernel in problem(method).spec.kernels:
        indices, sigma, rates = got[kernel.path]
        order, all_sigma, all_rates = want[kernel.path]
        np.testing.assert_array_equal(indices, order[: kernel.ranked])
        np.testing.assert_allclose(sigma, all_sigma, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(rates, all_rates, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS[1:])
def test_what_launch_does_to_the_function(method):
    """It is the one before, or the pretrained one."""
    for delta_at in library_run(method).deltas.values():
        before, at = delta_at[LAUNCH - 1], delta_at[LAUNCH]
        expected = np.zeros_like(before) if method in ("init", "tsd") else before
        np.testing.assert_allclose(at, expected, atol=1e-6)
        assert np.linalg.norm(before) > 0.1
        assert np.linalg.norm(delta_at[LAUNCH + 1] - at) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_the_runs_try_what_can_go_wrong(method):
    """Clipping acts on some steps of both phases, and every gain has moved."""
    trace = reference_run(method)
    for phase in (trace.norm[:LAUNCH], trace.norm[LAUNCH:]):
        assert phase.min() < CLIP < phase.max()
    if method_of(method).gains:
        for gains in trace.gains.values():
            assert (gains[: LAUNCH + 1] == 0).all()
            assert np.abs(gains[-1]).min() > 1e-3
