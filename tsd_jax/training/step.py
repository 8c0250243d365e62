"""One optimizer step, and the launch between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from tsd_jax.core.adapter import Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import Spec
from tsd_jax.core.types import LossFn, Progress
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.matrix_launch import Ranking
from tsd_jax.extraction.ranking import EPSILON
from tsd_jax.extraction.settings import Extraction
from tsd_jax.training.moments import reset_moments
from tsd_jax.training.state import TrainState

Bind = Callable[[Any, Trainable, Mapping[str, Directions], jax.Array | None], Any]
"""(params, trainable, directions, dropout key or None) -> what the loss is called with.

`tsd_jax.bind_variables` for Linen models, `tsd_jax.nnx.make_bind(model)` for NNX ones.
"""


def accumulate_gradients(
    loss_fn: LossFn,
    bind: Bind,
    state: TrainState,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    key: jax.Array | None,
) -> tuple[Any, jax.Array, jax.Array]:
    """Return the gradient of the mean loss over all counted targets of a batch.

    The loss is the summed loss of all micro-batches over the number of targets
    counted in all of them, so that unequal micro-batches weigh as their targets do
    (transformers, pull request 34191).

    Args:
      loss_fn: (what `bind` returns, micro-batch) -> (summed loss, counted targets).
      bind: how adapters meet the base; see `Bind`.
      state: the run's state; only its `trainable` is differentiated.
      params: the base's tree.
      batch: arrays (micro-batches, examples, positions).
      key: dropout key, or None.

    Returns:
      Gradients like `state.trainable`, the mean loss () and the counted targets ().
    """

    def summed(trainable: Trainable, micro: Mapping[str, jax.Array], key):
        return loss_fn(bind(params, trainable, state.directions, key), micro)

    def add(carry, micro_and_index):
        micro, index = micro_and_index
        own = None if key is None else jax.random.fold_in(key, index)
        (loss, count), grads = jax.value_and_grad(summed, has_aux=True)(
            state.trainable, micro, own
        )
        return jax.tree.map(jnp.add, carry, (grads, loss, count)), None

    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    start = (zeros, jnp.zeros(()), jnp.zeros(()))
    (grads, loss, count), _ = jax.lax.scan(
        add, start, (dict(batch), jnp.arange(micro_batches))
    )
    share = 1 / jnp.maximum(count, 1)
    return jax.tree.map(lambda g: g * share, grads), loss * share, count


def make_train_step(
    loss_fn: LossFn,
    bind: Bind,
    optimizer: optax.GradientTransformation,
    *,
    dropout: bool = False,
    state_shardings: Any = None,
    param_shardings: Any = None,
    batch_shardings: Any = None,
) -> Any:
    """Return the jitted step (state, params, batch, key) -> (state, metrics).

    The state is donated. Shardings that are given hold for inputs and outputs, so that
    one executable serves the whole run, launch included.

    Args:
      loss_fn: (what `bind` returns, micro-batch) -> (summed loss, counted targets).
      bind: how adapters meet the base; see `Bind`.
      optimizer: optimizer of what trains.
      dropout: whether to draw dropout keys, from `key` and the step.
      state_shardings: TrainState of shardings, or None.
      param_shardings: shardings of the base's tree.
      batch_shardings: shardings of a batch's arrays.

    Returns:
      The jitted function. Its metrics are loss (mean over counted targets), grad_norm
      (before clipping) and targets.
    """

    def train_step(state: TrainState, params, batch, key):
        own = jax.random.fold_in(key, state.step) if dropout else None
        grads, loss, count = accumulate_gradients(
            loss_fn, bind, state, params, batch, own
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "targets": count,
        }
        new = state.replace(
            step=state.step + 1,
            trainable=optax.apply_updates(state.trainable, updates),
            opt_state=opt_state,
        )
        return new, metrics

    pinned = {}
    if state_shardings is not None:
        pinned = {
            "in_shardings": (state_shardings, param_shardings, batch_shardings, None),
            "out_shardings": (state_shardings, None),
        }
    return jax.jit(train_step, donate_argnums=0, **pinned)


def launch_state(
    state: TrainState,
    params: Mapping[str, Any],
    spec: Spec,
    *,
    epsilon: float = EPSILON,
    seed: int = 0,
    deltas: Mapping[str, jax.Array] | None = None,
    extraction: Extraction | None = None,
    progress: Progress | None = None,
    state_shardings: Any = None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, dict[str, Ranking]]:
    """Return the state after launch: what trains starts on the ranked directions.

    Args:
      state: state before launch.
      params: the base's tree.
      spec: of `make_spec`.
      epsilon: see `launch`.
      seed: see `launch`.
      deltas: see `launch`.
      extraction: see `launch`.
      progress: see `launch`.
      state_shardings: shardings of the new state; None keeps those of the old one.
      optimizer: optimizer of the state, needed where its moments do not start at zero;
        see `reset_moments`.

    Returns:
      The state with `launched` set, and {path: Ranking}.

    Raises:
      InputError: the state has launched already, `launch` refuses it, or its moments
        cannot be reset.
    """
    if not isinstance(state.launched, Tracer) and state.launched:
        raise InputError("this state has launched already; a run launches once")
    trainable, directions, report = launch(
        params,
        state.trainable,
        spec,
        epsilon=epsilon,
        seed=seed,
        deltas=deltas,
        extraction=extraction,
        progress=progress,
    )
    initial = None if optimizer is None else optimizer.init(cast(Any, trainable))
    new = state.replace(
        launched=jnp.ones_like(state.launched),
        trainable=trainable,
        directions=directions,
        opt_state=reset_moments(state.opt_state, spec.method, initial=initial),
    )
    if state_shardings is not None:
        new = jax.device_put(new, state_shardings)
    return new, report
