"""What the loop calls, without a loop."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsd_jax.app import callbacks
from tsd_jax.binding.linen import adapted, make_spec
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import Extraction
from tsd_jax.training.auto_launch import AutoLaunchConfig
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.state import create_state

SETTLES = AutoLaunchConfig(launch_min=1, launch_max=9, every=1, patience=2)
MODEL = nn.Dense(7, use_bias=False)


def params():
    kernel = np.random.default_rng(0).normal(size=(6, 7))
    return {"kernel": jnp.asarray(kernel, jnp.float32)}


RULE = Rule(pattern="kernel", rank=2, directions=3)
SPEC = make_spec(MODEL.apply, {"params": params()}, [RULE], jnp.eye(6), method="dash")


def state(auto_launch=None, step=0):
    optimizer: optax.GradientTransformation = make_optimizer(1e-3, 1e-3)
    made = create_state(
        jax.random.key(0), SPEC, optimizer, auto_launch, params=params()
    )
    (adapter,) = made.trainable.adapters.values()
    learned = {"kernel": adapter.replace(b=jnp.ones_like(adapter.b))}
    trainable = made.trainable.replace(adapters=learned)
    return made.replace(step=jnp.int32(step), trainable=trainable)


def test_the_monitor_is_made_at_the_first_check_and_can_be_released(monkeypatch):
    made = []
    plain = callbacks.DirectionMonitor

    def counted(*args, **kwargs):
        made.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(callbacks, "DirectionMonitor", counted)
    check = callbacks.SettleCheck(params(), SPEC, SETTLES, 1e-6)
    assert not made
    once = check(state(SETTLES))
    twice = check(once)
    assert len(made) == 1
    assert int(twice.monitor.checks) == 2
    check.release()
    check(twice)
    assert len(made) == 2


def quadratic(variables, batch):
    """A loss whose gradient of K is the batch's own x."""
    return jnp.sum(adapted(MODEL.apply)(variables, jnp.eye(6)) * batch["x"]), jnp.ones(
        ()
    )


def launch_of(asked, gradient_batches, released=None):
    def batch(step):
        asked.append(step)
        x = np.random.default_rng(step).normal(size=(1, 6, 7))
        return {"x": jnp.asarray(x, jnp.float32)}

    return callbacks.Launch(
        params=params(),
        spec=SPEC,
        epsilon=1e-6,
        seed=0,
        extraction=Extraction(),
        gradient_batches=gradient_batches,
        loss_fn=quadratic,
        batch=batch,
        progress=lambda done, total: None,
        shardings=None,
        release=lambda: released.append(True) if released is not None else None,
    )


def test_a_launch_by_gradient_ranks_the_batches_that_come_next():
    asked: list[int] = []
    _, report = launch_of(asked, 2)(state(step=5))
    assert asked == [5, 6]
    draws = [np.random.default_rng(step).normal(size=(6, 7)) for step in asked]
    total = np.sum(draws, axis=0).astype(np.float32).astype(np.float64)
    left, sigma, right = np.linalg.svd(np.asarray(params()["kernel"], np.float64))
    change = np.abs(np.einsum("ij,ik,kj->j", left, total, right.T[:, :6]))
    rates = change / (sigma + 1e-6)
    np.testing.assert_array_equal(
        np.asarray(report["kernel"].indices).reshape(-1), np.argsort(-rates)[:3]
    )


def test_a_launch_by_what_pre_launch_changed_asks_for_no_batch():
    asked: list[int] = []
    released: list[bool] = []
    launched, _ = launch_of(asked, 0, released)(state(step=5))
    assert bool(launched.launched)
    assert asked == []
    assert released == [True]


def test_what_was_ranked_is_written(tmp_path):
    _, report = launch_of([], 0)(state())
    callbacks.rankings_writer(tmp_path)(report)
    with np.load(tmp_path / "directions.npz") as arrays:
        assert arrays["kernel/indices"].shape == (1, 3)


def test_a_state_is_scored_as_the_base_with_its_adapters():
    seen = []
    evaluate = callbacks.state_evaluation(lambda v: seen.append(v) or {}, params())
    assert evaluate(state()) == {}
    (variables,) = seen
    assert set(variables) == {"params"}
    assert "kernel" in variables["params"]
