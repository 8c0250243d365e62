"""Losses and scores of classifications and regressions, as GLUE has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.core.types import Batch, LossFn
from tsd_jax.evaluation.loss import token_log_likelihood
from tsd_jax.evaluation.scoring import PlaceFn, cut_batches, fetch

LogitsFn = Callable[[Any, Batch], jax.Array]


def make_logits(apply_fn: Callable[..., jax.Array]) -> LogitsFn:
    """Make the function (variables, batch) -> logits (B, labels).

    Args:
      apply_fn: (variables, tokens, positions, mask, token types) -> logits.
    """

    def logits_fn(variables: Any, batch: Batch) -> jax.Array:
        mask = batch["mask"] > 0
        return apply_fn(variables, batch["tokens"], None, mask, batch["token_types"])

    return logits_fn


def classification_loss(apply_fn: Callable[..., jax.Array]) -> LossFn:
    """Make the loss: fn(variables, batch) -> (summed cross-entropy, summed weights).

    Args:
      apply_fn: as of `make_logits`.
    """
    logits_fn = make_logits(apply_fn)

    def loss_fn(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        targets, weights = batch["targets"][:, 0], batch["weights"][:, 0]
        likelihood = token_log_likelihood(logits_fn(variables, batch), targets)
        return -jnp.sum(likelihood * weights), jnp.sum(weights)

    return loss_fn


def regression_loss(apply_fn: Callable[..., jax.Array]) -> LossFn:
    """Make the loss: fn(variables, batch) -> (summed squared error, summed weights).

    Args:
      apply_fn: as of `make_logits`, with one label.
    """
    logits_fn = make_logits(apply_fn)

    def loss_fn(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        error = logits_fn(variables, batch) - batch["targets"]
        return jnp.sum(error**2 * batch["weights"]), jnp.sum(batch["weights"])

    return loss_fn


LOSSES: Mapping[str, Callable[[Callable[..., jax.Array]], LossFn]] = {
    "classification": classification_loss,
    "regression": regression_loss,
}


def predict(
    logits_fn: LogitsFn,
    variables: Any,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    place: PlaceFn = lambda batch: batch,
) -> np.ndarray:
    """Return the logits of all rows, (N, labels) float32; no padding is among them.

    Args:
      logits_fn: of `make_logits`; jitted here, compiled once for all calls with it.
      variables: its first argument, sharded or not.
      arrays: tokens, mask, token_types and more, each (N, ...).
      batch_size: rows a batch.
      place: puts a batch on the devices.
    """
    step = jax.jit(logits_fn)
    batches = cut_batches(arrays, batch_size)
    parts = [fetch(step(variables, place(batch))) for batch in batches]
    return np.concatenate(parts)[: len(arrays["tokens"])]


def classification_scores(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return accuracy, F1, Matthews' correlation and the mean cross-entropy.

    F1 is that of class 1 where there are two, and else the mean over classes.

    Args:
      logits: (N, C). targets: (N,) classes.

    Raises:
      InputError: there are no rows.
    """
    _check_rows(targets)
    found = np.argmax(logits, axis=-1)
    count = logits.shape[-1]
    table = np.zeros((count, count), np.float64)  # [target, found]
    np.add.at(table, (targets, found), 1)
    wide = logits.astype(np.float64)
    peak = np.max(wide, axis=-1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(wide - peak), axis=-1)) + peak[:, 0]
    loss = np.mean(log_sum - wide[np.arange(len(targets)), targets])
    finite = np.isfinite(logits).all(axis=-1)
    return {
        "accuracy": float(np.mean((found == targets) & finite)),
        "f1": _f1(table),
        "matthews": _matthews(table),
        "loss": float(loss),
        "count": len(targets),
    }


def regression_scores(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    A correlation with what does not vary is 0.

    Args:
      logits: (N, 1). targets: (N,) numbers.

    Raises:
      InputError: there are no rows.
    """
    _check_rows(targets)
    found = logits[:, 0].astype(np.float64)
    wanted = targets.astype(np.float64)
    return {
        "pearson": _pearson(found, wanted),
        "spearman": _pearson(_ranks(found), _ranks(wanted)),
        "mse": float(np.mean((found - wanted) ** 2)),
        "count": len(targets),
    }


SCORES: Mapping[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "classification": classification_scores,
    "regression": regression_scores,
}


def _check_rows(targets: np.ndarray) -> None:
    if not len(targets):
        raise InputError("there are no rows to score")


def _f1(table: np.ndarray) -> float:
    right = np.diag(table)
    total = table.sum(axis=0) + table.sum(axis=1)
    each = np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)
    return float(each[1] if len(table) == 2 else np.mean(each[total > 0]))


def _matthews(table: np.ndarray) -> float:
    """Correlate classes (Gorodkin 2004): (s c - p·t) / sqrt((s² - p·p)(s² - t·t))."""
    wanted, found = table.sum(axis=1), table.sum(axis=0)
    size = table.sum()
    above = np.trace(table) * size - wanted @ found
    below = (size**2 - found @ found) * (size**2 - wanted @ wanted)
    return float(above / np.sqrt(below)) if below > 0 else 0.0


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    below = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / below) if below > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank from 1 on; what is equal shares the mean of its ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
