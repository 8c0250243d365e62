"""One optimizer for A, B and DoRA's m ("lora"), gains ("gain") and full parameters ("full").

Before launch the gains' gradients are exactly zero (L = R = 0), so they move nothing
and add nothing to the clipping norm. What must not go on over the launch is Adam's
step count: bias correction would take the gains' first gradients for the end of a
long run of zeros and more than double the update. `reset_moments` starts Adam again,
count included, while the schedules outside it read on from the global step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from tsd_jax.core.adapter import Adapter, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.leaves import FACTORS, FULL, GAINS, GROUPS, Group, leaf_specs
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
    """Rise linearly from 0 over `warmup` steps, then decay over the rest.

    With "linear" it is the schedule of Hugging Face's trainer. With `restart` = t it
    is that schedule before step t, and from there on a new one over what is left:

        rate(n) = s(n; steps) for n < t,  s(n - t; steps - t) for n >= t

    Args:
      peak: highest learning rate.
      steps: of the whole run, warm-up and pre-launch included.
      warmup: steps of the rise.
      decay: "constant", "linear" or "cosine".
      restart: the step (of launch) to start again at; None to go on.

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
    """Label the leaves there are by their groups."""
    labels = {
        name: spec.group.name
        for name, spec in leaf_specs(Adapter).items()
        if spec.group is not None and getattr(adapter, name) is not None
    }
    return adapter.replace(**labels)


def group_labels(trainable: Trainable) -> Trainable:
    """Label every leaf with its optimizer group, for `optax.partition`.

    "lora" (A, B and m), "gain", and, where there are full parameters, "full".
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
    """Build AdamW over all groups, each with a learning rate of its own.

    Args:
      learning_rate: of A, B and m. gain_learning_rate: of the gains.
      full_learning_rate: of parts trained whole; None for that of A and B.
      b1: of Adam. b2: of Adam. eps: of Adam.
      weight_decay: decoupled, on A, B, parts and, as with PEFT, m; gains have none.
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


def reset_moments(
    opt_state: optax.OptState, method: Method, labels: Mapping[str, str] | None = None
) -> optax.OptState:
    """Start Adam again for what launch starts again; schedules go on.

    `dash` resets the gains (their count has run), `init` and `tsd` A, B and m as well;
    parts trained whole go on.

    Args:
      opt_state: of an optimizer with an `optax.partition` over `group_labels`
        anywhere in its chain.
      method: that launched.
      labels: names of the groups "lora" and "gain" in a partition of your own.

    Raises:
      InputError: there is no partition with these groups.
    """
    names = {group.name: group.name for group in GROUPS} | dict(labels or {})
    groups = {names[group.name] for group in GROUPS if group.resets(method)}
    found = False

    def is_adam(node) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def zero(node):
        return jax.tree.map(jnp.zeros_like, node) if is_adam(node) else node

    def restart(node):
        nonlocal found
        if not isinstance(node, optax.transforms.PartitionState):
            return node
        if not groups <= set(node.inner_states):
            return node
        found = True
        inner = {
            name: jax.tree.map(zero, inner, is_leaf=is_adam)
            if name in groups
            else inner
            for name, inner in node.inner_states.items()
        }
        return node._replace(inner_states=inner)

    state = jax.tree.map(
        restart,
        opt_state,
        is_leaf=lambda node: isinstance(node, optax.transforms.PartitionState),
    )
    if not found:
        raise InputError(
            f"the optimizer state has no optax.partition with the groups "
            f"{sorted(groups)}; label them with tsd_jax.group_labels"
        )
    return state
