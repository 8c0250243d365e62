"""Losses and scores of classification and regression, as in GLUE."""

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
    """Return the function (variables, batch) -> logits (B, labels).

    Args:
      apply_fn: (variables, tokens, positions, mask, token types) -> logits.
    """

    def logits_fn(variables: Any, batch: Batch) -> jax.Array:
        mask = batch["mask"] > 0
        return apply_fn(variables, batch["tokens"], None, mask, batch["token_types"])

    return logits_fn


def classification_loss(apply_fn: Callable[..., jax.Array]) -> LossFn:
    """Return the loss (variables, batch) -> (summed cross-entropy, summed weights).

    Args:
      apply_fn: as for `make_logits`.
    """
    logits_fn = make_logits(apply_fn)

    def loss_fn(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        targets, weights = batch["targets"][:, 0], batch["weights"][:, 0]
        likelihood = token_log_likelihood(logits_fn(variables, batch), targets)
        return -jnp.sum(likelihood * weights), jnp.sum(weights)

    return loss_fn


def regression_loss(apply_fn: Callable[..., jax.Array]) -> LossFn:
    """Return the loss (variables, batch) -> (summed squared error, summed weights).

    Args:
      apply_fn: as for `make_logits`, with one label.
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
    """Return the logits of all rows, (N, labels) float32, without padding rows.

    Args:
      logits_fn: from `make_logits`; compiled once for all calls with the same object.
      variables: its first argument, sharded or not.
      arrays: tokens, mask, token_types and more, each (N, ...).
      batch_size: rows in a batch.
      place: puts a batch on the devices.
    """
    step = jax.jit(logits_fn)
    batches = cut_batches(arrays, batch_size)
    parts = [fetch(step(variables, place(batch))) for batch in batches]
    return np.concatenate(parts)[: len(arrays["tokens"])]


def classification_scores(
    logits: np.ndarray, targets: np.ndarray, positive: int = 1
) -> dict[str, float]:
    """Return accuracy, F1, Matthews' correlation and the mean cross-entropy.

    F1 is that of the positive class for two classes, else the mean over the classes.

    Args:
      logits: (N, C).
      targets: classes, (N,) int.
      positive: of two classes, the one whose F1 is meant.

    Raises:
      InputError: there are no rows.
    """
    _check_rows(targets)
    predicted = np.argmax(logits, axis=-1)
    count = logits.shape[-1]
    confusion = np.zeros((count, count), np.float64)  # [target, predicted]
    np.add.at(confusion, (targets, predicted), 1)
    exact = logits.astype(np.float64)
    peak = np.max(exact, axis=-1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(exact - peak), axis=-1)) + peak[:, 0]
    loss = np.mean(log_sum - exact[np.arange(len(targets)), targets])
    finite = np.isfinite(logits).all(axis=-1)
    return {
        "accuracy": float(np.mean((predicted == targets) & finite)),
        "f1": _f1(confusion, positive),
        "matthews": _matthews(confusion),
        "loss": float(loss),
        "count": len(targets),
    }


def regression_scores(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation and the mean squared error.

    A correlation with a constant is 0.

    Args:
      logits: (N, 1).
      targets: numbers, (N,).

    Raises:
      InputError: there are no rows.
    """
    _check_rows(targets)
    predicted = logits[:, 0].astype(np.float64)
    target = targets.astype(np.float64)
    return {
        "pearson": _pearson(predicted, target),
        "spearman": _pearson(_ranks(predicted), _ranks(target)),
        "mse": float(np.mean((predicted - target) ** 2)),
        "count": len(targets),
    }


def _check_rows(targets: np.ndarray) -> None:
    if not len(targets):
        raise InputError("there are no rows to score")


def _f1(confusion: np.ndarray, positive: int) -> float:
    correct = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    each = np.divide(2 * correct, total, out=np.zeros_like(total), where=total > 0)
    return float(each[positive] if len(confusion) == 2 else np.mean(each[total > 0]))


def _matthews(confusion: np.ndarray) -> float:
    """Return (s c - p·t) / sqrt((s² - p·p)(s² - t·t)), for any number of classes.

    Source:
      Gorodkin 2004.
    """
    target, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    size = confusion.sum()
    above = np.trace(confusion) * size - target @ predicted
    below = (size**2 - predicted @ predicted) * (size**2 - target @ target)
    return float(above / np.sqrt(below)) if below > 0 else 0.0


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    below = np.sqrt((one @ one) * (other @ other))
    return float(one @ other / below) if below > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]
