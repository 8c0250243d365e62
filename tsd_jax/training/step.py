"""One optimizer step, and the launch between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tsd_jax.core.adapter import Directions, Trainable
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
      loss_fn: summed loss and count of one micro-batch.
      bind: puts what trains beside or into the base.
      state: its `trainable` is differentiated, and nothing else.
      params: the base's tree.
      batch: leaves (micro-batches, examples, positions).
      key: for dropout, or None.

    Returns:
      gradients like `state.trainable`, mean loss (), counted targets ().
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
    """Build the jitted step (state, params, batch, key) -> (state, metrics).

    The state is donated; with shardings given they are pinned on both sides, so that
    one executable serves the whole run, launch included.

    Args:
      loss_fn: (what `bind` returns, micro-batch) -> (summed loss, counted targets).
      bind: puts what trains beside or into the base; see `Bind`.
      optimizer: over what trains.
      dropout: whether keys are drawn for it; `key` is folded with the step.
      state_shardings: a TrainState of shardings, or None.
      param_shardings: of the base. batch_shardings: of a batch's arrays.

    Returns:
      A jitted function; metrics are loss (mean over counted targets), grad_norm
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
) -> tuple[TrainState, dict[str, Ranking]]:
    """Launch: rank the directions, start what trains on them, reset its moments.

    Args:
      state: before launch.
      params: the base's tree.
      spec: of `make_spec`.
      epsilon, seed, changes, extraction, progress: see `launch`.
      state_shardings: where the new state shall lie; None keeps it where it is.

    Returns:
      The state with `launched` set, and {path: Ranking}.
    """
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
    new = state.replace(
        launched=jnp.ones_like(state.launched),
        trainable=trainable,
        directions=directions,
        opt_state=reset_moments(state.opt_state, spec.method),
    )
    if state_shardings is not None:
        new = jax.device_put(new, state_shardings)
    return new, report
