from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.trees import filled, pair_shapes, small_spec, without_gains, zeros
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.core.methods import get_method
from tsd_jax.training.optimizer import (
    check_schedule,
    group_labels,
    make_optimizer,
    make_schedule,
)


def hugging_face(kind: str, step: int, warmup: int, steps: int) -> float:
    """Repeat `transformers.get_{kind}_schedule_with_warmup`, as a share of the peak."""
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (steps - step) / max(1, steps - warmup))
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedules_are_those_of_hugging_face(kind, warmup):
    schedule = make_schedule(3e-4, steps=20, warmup=warmup, decay=kind)
    got = [np.asarray(schedule(jnp.asarray(step))) for step in range(20)]
    want = [3e-4 * hugging_face(kind, step, warmup, 20) for step in range(20)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_restarted_schedule_is_two_of_them(kind):
    """The first still aims at the whole budget, the second at what is left of it."""
    schedule = make_schedule(3e-4, steps=20, warmup=3, decay=kind, restart=8)
    got = [np.asarray(schedule(jnp.asarray(step))) for step in range(20)]
    want = [hugging_face(kind, step, 3, 20) for step in range(8)]
    want += [hugging_face(kind, step, 3, 12) for step in range(12)]
    np.testing.assert_allclose(got, np.multiply(3e-4, want), rtol=1e-5, atol=1e-11)


def test_a_restart_at_the_start_is_none():
    schedule = make_schedule(3e-4, steps=20, warmup=3, restart=0)
    got = [np.asarray(schedule(jnp.asarray(step))) for step in range(20)]
    want = [3e-4 * hugging_face("linear", step, 3, 20) for step in range(20)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restart": 6, "warmup": 4}, r"warmup 4 must be in .*, steps are 4"),
        ({"decay": "wsd"}, "unknown decay 'wsd'; choose one of constant, linear, cos"),
        ({"warmup": 10}, r"warmup 10 must be in \[0, steps\), steps are 10"),
        ({"warmup": -1}, "warmup -1 must be in"),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make_schedule(1e-3, steps=10, **settings)


SPEC = small_spec("tsd", shape=(3, 4), rank=2, directions=2)
RATE, GAIN_RATE = 1e-2, 3e-1


def of(adapter: Any) -> Any:
    """Return what trains where there is one adapter and nothing else."""
    return Trainable(adapters={"k": adapter})


def tree(seed: int | None) -> Any:
    """Return an adapter of random numbers, or of zeros."""
    shapes = of(pair_shapes(SPEC.kernels[0])[0])
    return zeros(shapes) if seed is None else filled(seed, shapes)


@functools.cache
def optimizer(**settings: Any) -> tuple[Any, Any]:
    made = make_optimizer(
        settings.pop("rate", RATE), settings.pop("gain_rate", GAIN_RATE), **settings
    )
    return made, jax.jit(made.update)


def run(update, state, gradients, params=None):
    """Return the updates of every step as {field: array}, and the last state."""
    updates = []
    for grads in gradients:
        step, state = update(grads, state, tree(None) if params is None else params)
        updates.append(
            {f: np.asarray(getattr(step.adapters["k"], f)) for f in ("a", "b", "gain")}
        )
    return updates, state


BEFORE = [without_gains(tree(seed)) for seed in range(100)]
AFTER = [tree(1000)] * 40  # a constant gradient: the update is the rate exactly


@functools.cache
def before_launch() -> Any:
    made, update = optimizer()
    return run(update, made.init(tree(None)), BEFORE)


def test_groups():
    labels = group_labels(tree(None)).adapters["k"]
    assert (labels.a, labels.b, labels.gain) == ("lora", "lora", "gain")
    lora = of(tree(None).adapters["k"].replace(gain=None))
    assert group_labels(lora).adapters["k"].gain is None
    assert labels.magnitude is None
    dora = of(tree(None).adapters["k"].replace(magnitude=jnp.zeros(4)))
    assert group_labels(dora).adapters["k"].magnitude == "lora"


def test_each_group_has_its_learning_rate():
    """A fresh Adam moves by its rate, against the sign of the gradient."""
    made, update = optimizer()
    grads = tree(5)
    (step,), _ = run(update, made.init(tree(None)), [grads])
    for field, rate in (("a", RATE), ("b", RATE), ("gain", GAIN_RATE)):
        sign = np.sign(getattr(grads.adapters["k"], field))
        np.testing.assert_allclose(step[field], -rate * sign, rtol=1e-5)


def test_gains_stand_still_before_launch():
    updates, _ = before_launch()
    assert all((step["gain"] == 0).all() for step in updates)
    assert all((step["a"] != 0).all() for step in updates)


def test_weight_decay_is_decoupled_and_spares_the_gains():
    made, update = optimizer(weight_decay=0.1)
    params, grads = tree(7), tree(8)
    (step,), _ = run(update, made.init(tree(None)), [grads], params)
    for field, rate, decay in (
        ("a", RATE, 0.1),
        ("b", RATE, 0.1),
        ("gain", GAIN_RATE, 0.0),
    ):
        want = np.sign(getattr(grads.adapters["k"], field)) + decay * getattr(
            params.adapters["k"], field
        )
        np.testing.assert_allclose(step[field], -rate * want, rtol=1e-4)


def test_clipping_is_by_the_norm_of_both_groups():
    """Adam hides the scale of a first gradient, so look at its first moment."""
    made, update = optimizer(clip_norm=0.5)
    for grads in (tree(9), without_gains(tree(9))):
        _, state = run(update, made.init(tree(None)), [grads])
        want = [np.asarray(grad) for grad in jax.tree.leaves(grads)]
        norm = math.sqrt(sum(float(np.sum(grad**2)) for grad in want))
        moments = [
            m
            for node in jax.tree.leaves(state, is_leaf=is_adam)
            if is_adam(node)
            for m in jax.tree.leaves(node.mu)
        ]
        assert norm > 1
        assert len(moments) == len(want) == 3
        order = zip(
            sorted(moments, key=np.shape), sorted(want, key=np.shape), strict=True
        )
        for moment, grad in order:
            np.testing.assert_allclose(moment, 0.1 * grad * 0.5 / norm, rtol=1e-5)


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


PART = FullSpec(path="norm", shape=(4,))


def both(seed: int) -> Any:
    """Return an adapter and a full parameter of random numbers."""
    value = jax.ShapeDtypeStruct((4,), np.float32)
    return tree(seed).replace(full={"norm": FullParam(filled(seed + 9, value), PART)})


def test_full_parameters_are_a_group_of_their_own():
    labels = group_labels(both(0))
    assert labels.full["norm"] == FullParam("full", PART)
    assert labels.adapters["k"].a == labels.adapters["k"].b == "lora"
    assert set(jax.tree.leaves(group_labels(tree(0)))) == {"lora", "gain"}


@pytest.mark.parametrize(("rate", "used"), [(None, RATE), (0.5, 0.5)])
def test_full_parameters_have_a_rate_of_their_own_and_the_decay_of_a_and_b(rate, used):
    """The first step of AdamW is -rate (g / (|g| + eps) + decay value)."""
    made = make_optimizer(RATE, GAIN_RATE, full_learning_rate=rate, weight_decay=0.3)
    trainable, grads = both(0), both(1)
    updates: Any
    updates, _ = made.update(grads, made.init(trainable), trainable)
    direction = np.sign(np.asarray(grads.full["norm"].value))
    wanted = -used * (direction + 0.3 * np.asarray(trainable.full["norm"].value))
    np.testing.assert_allclose(updates.full["norm"].value, wanted, rtol=1e-5)


WARM = make_schedule(1e-3, steps=10, warmup=3)


@pytest.mark.parametrize(
    ("rate", "launch_step"),
    [(WARM, 1), (WARM, 0), (0.0, 5), (lambda step: 0.0, 5), (float("nan"), 5)],
    ids=["warm-up", "first step", "zero", "zero schedule", "nan"],
)
def test_a_launch_on_nothing_is_refused_before_the_run(rate, launch_step):
    with pytest.raises(InputError, match=f"after step {launch_step} .* is 0: launch"):
        check_schedule(rate, launch_step, get_method("tsd"))
    check_schedule(rate, launch_step, get_method("pissa"))
    check_schedule(rate, launch_step, get_method("lora"))


@pytest.mark.parametrize(("rate", "launch_step"), [(WARM, 2), (1e-4, 1)])
def test_one_step_with_a_rate_suffices(rate, launch_step):
    check_schedule(rate, launch_step, get_method("dash"))
