"""Deterministic batches: each a pure function of the seed and the step.

There is no state to save: a run that resumes at step n asks for batch n. Random
numbers are the raw Philox stream, which is the same in every version of NumPy (the
methods of `Generator` are not).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.data.encoding import Arrays, windows

T = TypeVar("T")


class Batches:
    """Batches of rows from an endless stream of epochs, each a permutation of all rows.

    Epochs are joined end to end: a batch may take the last rows of one and the first
    of the next, so no row is left out, whatever the batch size.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], batch_size: int, seed: int):
        """Check the arguments.

        Args:
          arrays: the rows, {name: (N, ...)}.
          batch_size: rows of a batch.
          seed: of the order.

        Raises:
          InputError: there are no rows, or a number is out of range.
        """
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1 or sizes == {0}:
            raise InputError(f"the data has {sorted(sizes)} rows; give at least one")
        self._arrays = dict(arrays)
        self._size = sizes.pop()
        self._batch_size = _checked_size(batch_size)
        # Two are enough: a batch seldom touches more than two epochs.
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(_permutation, self._size, _checked_seed(seed))
        )

    def batch(self, step: int) -> Arrays:
        """Return batch number `step`, counted from 0."""
        positions = step * self._batch_size + np.arange(self._batch_size)
        epochs, offsets = np.divmod(positions, self._size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch)[offsets[here]]
        return {name: array[rows] for name, array in self._arrays.items()}

    def steps(self, epochs: float) -> int:
        """Return the number of steps that cover the rows `epochs` times."""
        return math.ceil(epochs * self._size / self._batch_size)


class RandomWindows:
    """Batches of windows that start anywhere in one long array of token ids."""

    def __init__(self, ids: np.ndarray, length: int, batch_size: int, seed: int):
        """Check the arguments.

        Args:
          ids: token ids, (N,).
          length: tokens of a window.
          batch_size: windows of a batch.
          seed: of the random starts.

        Raises:
          InputError: the ids are too few for one window, or a number is out of range.
        """
        windows(ids[: length + 1], length)  # checks that one window fits
        self._ids = ids
        self._length = length
        self._batch_size = _checked_size(batch_size)
        self._seed = _checked_seed(seed)

    def batch(self, step: int) -> Arrays:
        """Return batch number `step`, counted from 0."""
        raw = np.random.Philox(key=[self._seed, step]).random_raw(self._batch_size)
        starts = (raw % (len(self._ids) - self._length)).astype(np.int64)
        spans = self._ids[starts[:, None] + np.arange(self._length + 1)]
        spans = spans.astype(np.int32)
        return {
            "tokens": spans[:, :-1],
            "targets": spans[:, 1:],
            "weights": np.ones((len(starts), self._length), np.float32),
        }


def hold_out(items: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Draw `count` items at random: (the others, those drawn), both in input order.

    Args:
      items: to split.
      count: how many to hold out.
      seed: of the draw.

    Raises:
      InputError: a part would be empty, or the seed is out of range.
    """
    if not 0 < count < len(items):
        raise InputError(
            f"cannot hold out {count} of {len(items)} items; give 1 to {len(items) - 1}"
        )
    drawn = set(_permutation(len(items), _checked_seed(seed), 0)[:count].tolist())
    rest = [item for n, item in enumerate(items) if n not in drawn]
    return rest, [items[n] for n in sorted(drawn)]


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    raw = np.random.Philox(key=[seed, epoch]).random_raw(size)
    return np.argsort(raw, kind="stable")


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise InputError(f"the data seed is {seed}; it must be in 0 .. 2^64 - 1")
    return seed


def _checked_size(batch_size: int) -> int:
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; it must be at least 1")
    return batch_size
