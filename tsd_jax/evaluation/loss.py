"""Next-token likelihoods, for training and evaluation.

A batch has "tokens" (B, T), "targets" (B, T) and "weights" (B, T). Losses are sums, never
means: sums add up over micro-batches, hosts and batches of unequal token counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tsd_jax.core.types import Batch, LossFn

ScoreFn = Callable[[Any, Batch], jax.Array]
"""(model variables, batch) -> one score for each row, (B,) float32."""


def token_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return log p(target) at every position, in float32.

    log p_t = z_t[y_t] - log sum_v exp z_t[v]

    Args:
      logits: z, (..., V), any float dtype.
      targets: y, (...), int.
    """
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def next_token_loss(apply_fn: Callable[..., jax.Array]) -> LossFn:
    """Return the loss (variables, batch) -> (summed loss, summed weights), float32.

    Args:
      apply_fn: (variables, tokens (B, T)) -> logits (B, T, V).
    """

    def loss_fn(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        likelihood = _weighted(apply_fn, variables, batch)
        return -jnp.sum(likelihood), jnp.sum(batch["weights"], dtype=jnp.float32)

    return loss_fn


def sequence_log_likelihood(apply_fn: Callable[..., jax.Array]) -> ScoreFn:
    """Return the score (variables, batch) -> log-likelihood of each row, (B,) float32.

    Args:
      apply_fn: (variables, tokens (B, T)) -> logits (B, T, V).
    """

    def score_fn(variables: Any, batch: Batch) -> jax.Array:
        return jnp.sum(_weighted(apply_fn, variables, batch), axis=-1)

    return score_fn


def _weighted(
    apply_fn: Callable[..., jax.Array], variables: Any, batch: Batch
) -> jax.Array:
    logits = apply_fn(variables, batch["tokens"])
    weights = jnp.asarray(batch["weights"], jnp.float32)
    return token_log_likelihood(logits, batch["targets"]) * weights
