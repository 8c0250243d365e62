"""One optimizer for A, B and DoRA's m ("lora"), gains ("gain") and full parameters.

Each group has a learning rate of its own; `moments` has what launch resets.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tsd_jax.core.adapter import Adapter, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.leaves import FACTORS, FULL, GAINS, Group, leaf_specs
from tsd_jax.core.methods import Method

DECAYS: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}


def make_schedule(
    peak: float,
    *,
    steps: int,
    warmup: int = 0,
    decay: str = "linear",
    restart: int | None = None,
) -> optax.Schedule:
    """Return a schedule that rises linearly from 0, then decays over the rest.

    With "linear" it is the schedule of Hugging Face's trainer. With `restart` = t it
    is that schedule before step t, and a new one over the remaining steps after it:

        rate(n) = s(n; steps) for n < t,  s(n - t; steps - t) for n >= t

    Args:
      peak: highest learning rate.
      steps: number of steps of the whole run, warm-up and pre-launch included.
      warmup: number of steps of the rise.
      decay: "constant", "linear" or "cosine".
      restart: step (of launch) at which the schedule restarts; None for no restart.

    Raises:
      InputError: unknown decay, or a warm-up as long as the run or what is left of it.
    """
    if restart:
        before = make_schedule(peak, steps=steps, warmup=warmup, decay=decay)
        again = make_schedule(peak, steps=steps - restart, warmup=warmup, decay=decay)
        return optax.join_schedules([before, again], [restart])
    if decay not in DECAYS:
        raise InputError(f"unknown decay {decay!r}; choose one of {', '.join(DECAYS)}")
    if not 0 <= warmup < steps:
        raise InputError(f"warmup {warmup} must be in [0, steps), steps are {steps}")
    after = DECAYS[decay](peak, steps - warmup)
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), after], [warmup]
    )


def _labels(adapter: Adapter) -> Adapter:
    """Return an adapter with the name of its group in place of every leaf."""
    labels = {
        name: spec.group.name
        for name, spec in leaf_specs(Adapter).items()
        if spec.group is not None and getattr(adapter, name) is not None
    }
    return adapter.replace(**labels)


def group_labels(trainable: Trainable) -> Trainable:
    """Return the optimizer group of every leaf, for `optax.partition`.

    The groups are "lora" (A, B and m), "gain", and, where there are full parameters,
    "full".

    Args:
      trainable: what trains, or a tree like it.
    """
    adapters = {path: _labels(each) for path, each in trainable.adapters.items()}
    full = {
        path: each.replace(value=FULL.name) for path, each in trainable.full.items()
    }
    return Trainable(adapters=adapters, full=full)


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    gain_learning_rate: optax.ScalarOrSchedule,
    *,
    full_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Return AdamW over all groups, each with a learning rate of its own.

    Args:
      learning_rate: learning rate of A, B and m.
      gain_learning_rate: learning rate of the gains.
      full_learning_rate: learning rate of full parameters; None for that of A and B.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: epsilon of Adam.
      weight_decay: decoupled decay of A, B, full parameters and, as with PEFT, m;
        gains have none.
      clip_norm: bound on the global norm of all gradients; None for no clipping.
    """
    if full_learning_rate is None:
        full_learning_rate = learning_rate
    rates: dict[Group, optax.ScalarOrSchedule] = {
        FACTORS: learning_rate,
        GAINS: gain_learning_rate,
        FULL: full_learning_rate,
    }
    groups: dict[Hashable, optax.GradientTransformation] = {
        group.name: optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
            optax.add_decayed_weights(weight_decay if group.decays else 0.0),
            optax.scale_by_learning_rate(rate),
        )
        for group, rate in rates.items()
    }
    clip = (
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    )
    return optax.chain(clip, optax.partition(groups, cast(Any, group_labels)))


def check_schedule(
    learning_rate: optax.ScalarOrSchedule, launch_step: int, method: Method
) -> None:
    """Raise InputError where nothing is learned before launch that it could rank by.

    Args:
      learning_rate: learning rate of the group "lora", or its schedule.
      launch_step: number of steps before launch; of automatic launch the least.
      method: the method; nothing is checked where its launch needs no learned delta.
    """
    if not method.needs_delta:
        return
    if callable(learning_rate):
        rates = jax.vmap(learning_rate)(jnp.arange(launch_step))
    else:
        rates = np.full(launch_step, learning_rate)
    if not np.sum(rates) > 0:
        raise InputError(
            f"method {method.name!r} finds its directions in what training changes "
            f"before launch, but until the launch after step {launch_step} the "
            "learning rate is 0: launch later, shorten the warm-up or raise the rate"
        )
