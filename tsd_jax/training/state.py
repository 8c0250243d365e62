"""What a run carries from step to step, and nothing of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tsd_jax.core.adapter import init
from tsd_jax.core.spec import Spec
from tsd_jax.training.auto_launch import AutoLaunchConfig, init_monitor


class TrainState(struct.PyTreeNode):
    """Hold the run's arrays; all that a checkpoint needs.

    Attributes:
      step: optimizer steps taken, int32 ().
      launched: whether launch has happened, bool ().
      trainable: what trains. directions: what is frozen beside it.
      opt_state: of the optimizer, over `trainable` alone.
      monitor: what was seen of the directions so far, where that decides when to
        launch; None otherwise.
    """

    step: Any
    launched: Any
    trainable: Any
    directions: Any
    opt_state: Any
    monitor: Any = None


def create_state(
    key: jax.Array,
    spec: Spec,
    optimizer: optax.GradientTransformation,
    auto_launch: AutoLaunchConfig | None = None,
    *,
    params: Mapping[str, Any] | None = None,
) -> TrainState:
    """Start a run: adapters without effect, no directions, empty moments.

    Args:
      key: a JAX random key.
      spec: of `make_spec`. optimizer: over what trains.
      auto_launch: when directions have settled, where that decides when to launch.
      params: the base's tree, needed where the spec trains parameters whole or has
        DoRA.
    """
    trainable, directions = init(key, spec, params=params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        launched=jnp.zeros((), bool),
        trainable=trainable,
        directions=directions,
        opt_state=optimizer.init(cast(Any, trainable)),
        monitor=None if auto_launch is None else init_monitor(spec, auto_launch),
    )
