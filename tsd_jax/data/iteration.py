"""Deterministic batches: each a pure function of the seed and the step.

Nothing here has a state to save: a run that resumes at step n asks for batch n.
Random numbers are the raw Philox stream, which NumPy keeps the same in every version
(it does not for the methods of `Generator`).
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
    """Batches of rows: an endless stream of epochs, each a permutation of all rows.

    Epochs are joined end to end, so a batch may take the last rows of one and the
    first of the next: no row is left out, whatever the batch size.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Take arrays that share their first axis, (N, ...).

        Args:
          arrays: the rows.
          batch_size: rows of the global batch.
          seed: of the order.
          process_index: which of the equal shares of each batch this process reads.
          process_count: number of shares.

        Raises:
          InputError: there are no rows, or the batch cannot be shared out.
        """
        sizes = {len(array) for array in arrays.values()}
        if len(sizes) != 1 or sizes == {0}:
            raise InputError(f"the data has {sorted(sizes)} rows; it must have some")
        self._arrays = dict(arrays)
        self._size = sizes.pop()
        self._batch_size = batch_size
        self._share = _share(batch_size, process_index, process_count)
        # Two suffice: a batch seldom touches more than two epochs.
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(_permutation, self._size, _checked(seed))
        )

    def batch(self, step: int) -> Arrays:
        """Return this process's rows of batch `step` (from 0)."""
        positions = step * self._batch_size + self._share
        epochs, places = np.divmod(positions, self._size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch)[places[here]]
        return {name: array[rows] for name, array in self._arrays.items()}

    def steps(self, epochs: float) -> int:
        """Return the number of steps that see every row `epochs` times."""
        return math.ceil(epochs * self._size / self._batch_size)


class RandomWindows:
    """Batches of windows that start anywhere in one long run of token ids (N,)."""

    def __init__(
        self,
        ids: np.ndarray,
        length: int,
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Take the ids, the window length and, as `Batches`, what to draw.

        Raises:
          InputError: the ids do not fill one window, or the batch cannot be shared.
        """
        windows(ids[: length + 1], length)  # Checks that one window fits.
        self._ids = ids
        self._length = length
        self._batch_size = batch_size
        self._seed = _checked(seed)
        self._share = _share(batch_size, process_index, process_count)

    def batch(self, step: int) -> Arrays:
        """Return this process's windows of batch `step` (from 0)."""
        raw = np.random.Philox(key=[self._seed, step]).random_raw(self._batch_size)
        starts = (raw % (len(self._ids) - self._length)).astype(np.int64)[self._share]
        spans = self._ids[starts[:, None] + np.arange(self._length + 1)]
        spans = spans.astype(np.int32)
        return {
            "tokens": spans[:, :-1],
            "targets": spans[:, 1:],
            "weights": np.ones((len(starts), self._length), np.float32),
        }


def hold_out(items: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """Split items into (the rest, `count` drawn at random), both in their old order.

    Raises:
      InputError: nothing would be left on one side.
    """
    if not 0 < count < len(items):
        raise InputError(
            f"cannot hold out {count} of {len(items)} items; give 1 to {len(items) - 1}"
        )
    drawn = set(_permutation(len(items), _checked(seed), 0)[:count].tolist())
    rest = [item for n, item in enumerate(items) if n not in drawn]
    return rest, [items[n] for n in sorted(drawn)]


def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    raw = np.random.Philox(key=[seed, epoch]).random_raw(size)
    return np.argsort(raw, kind="stable")


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise InputError(f"the data seed is {seed}; it must be in 0 .. 2^64 - 1")
    return seed


def _share(batch_size: int, index: int, count: int) -> np.ndarray:
    """Return the places in a batch that belong to process `index`."""
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; it must be at least 1")
    if batch_size % count:
        raise InputError(
            f"a batch of {batch_size} cannot be shared out to {count} processes; "
            f"make it a multiple of {count}"
        )
    return np.arange(batch_size).reshape(count, -1)[index]
