"""Scoring by likelihood: mean NLL, and the choice among options.

The last batch is padded with rows of weight 0, so that one compiled program serves any
number of rows. `place` puts a global batch on the devices; on several hosts every
process passes the same batch, and keeps the rows of its own devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsd_jax.core.errors import InputError
from tsd_jax.core.types import Batch, LossFn
from tsd_jax.evaluation.loss import ScoreFn

PlaceFn = Callable[[Batch], Batch]
"""Batch on the host -> the same batch on the devices."""


def nll(
    loss_fn: LossFn,
    variables: Any,
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    place: PlaceFn = lambda batch: batch,
) -> dict[str, float]:
    """Return the mean negative log-likelihood per counted token.

    Sums over a batch are float32, their total is float64.

    Args:
      loss_fn: from `next_token_loss`; compiled once for all calls with the same object.
      variables: its first argument, sharded or not.
      arrays: tokens, targets and weights, each (N, T).
      batch_size: rows in a batch.
      place: puts a batch on the devices.

    Returns:
      "nll", "perplexity" and "tokens", the number of counted tokens.

    Raises:
      InputError: all weights are 0.
    """
    step = jax.jit(loss_fn)
    total = count = 0.0
    for batch in cut_batches(arrays, batch_size):
        loss, weight = step(variables, place(batch))
        total, count = total + float(loss), count + float(weight)
    if count == 0:
        raise InputError("there is no token to score: all weights are 0")
    mean = total / count
    # exp overflows above 709, which a diverged model reaches.
    perplexity = math.inf if mean > 700 else math.exp(mean)
    return {"nll": mean, "perplexity": perplexity, "tokens": int(count)}


def choices(
    score_fn: ScoreFn,
    variables: Any,
    arrays: Mapping[str, np.ndarray],
    groups: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    place: PlaceFn = lambda batch: batch,
) -> dict[str, float]:
    """Return the fraction of records whose correct option is the most likely one.

    A record with a score that is not finite counts as wrong.

    Args:
      score_fn: from `sequence_log_likelihood`; compiled once for all calls with the
        same object.
      variables: its first argument, sharded or not.
      arrays: tokens, targets and weights with a row for each option, each (R, T).
      groups: index of the record of each row, ascending, (R,).
      labels: index of the correct option within its record, (N,).
      batch_size: rows in a batch.
      place: puts a batch on the devices.

    Returns:
      "accuracy" and "count", the number of records.

    Raises:
      InputError: there are no records.
    """
    if not len(labels):
        raise InputError("there are no records to score")
    step = jax.jit(score_fn)
    parts = [fetch(step(variables, place(b))) for b in cut_batches(arrays, batch_size)]
    scores = np.concatenate(parts)[: len(groups)]
    starts = np.searchsorted(groups, np.arange(1, len(labels)))
    correct = [
        np.isfinite(own).all() and np.argmax(own) == label
        for own, label in zip(np.split(scores, starts), labels, strict=True)
    ]
    return {"accuracy": np.count_nonzero(correct) / len(labels), "count": len(labels)}


def cut_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of the rows; the last one is padded with zeros (weight 0)."""
    rows = len(arrays["tokens"])
    for start in range(0, rows, batch_size):
        missing = max(start + batch_size - rows, 0)
        yield {
            name: np.pad(array[start : start + batch_size], ((0, missing), (0, 0)))
            for name, array in arrays.items()
        }


def fetch(array: jax.Array) -> np.ndarray:
    """Return the whole array on the host, with the rows of other processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
