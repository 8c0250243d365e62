"""The arrays that a run carries from step to step, without the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Spec
from tsd_jax.training.auto_launch import AutoLaunchConfig, init_monitor


class TrainState(struct.PyTreeNode):
    """The arrays of a run, which are all that a checkpoint needs.

    Attributes:
      step: number of optimizer steps taken, int32 ().
      launched: whether launch has happened, bool ().
      trainable: what trains.
      directions: the frozen factors beside it.
      opt_state: state of the optimizer over `trainable` alone.
      monitor: MonitorState with automatic launch; None otherwise.
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
    """Return the state of a new run: adapters without effect, moments at their start.

    Args:
      key: a JAX random key.
      spec: of `make_spec`.
      optimizer: optimizer of what trains.
      auto_launch: settings of automatic launch; None for a launch at a fixed step.
      params: the base's tree; needed where the spec has full parameters or DoRA.
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
