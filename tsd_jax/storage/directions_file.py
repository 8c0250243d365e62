"""The file directions.npz: what launch found in every kernel, written and read.

It holds plain arrays under "<kernel path>/<field>", one row per matrix: `sigma` and
`rates` (matrices, k), `indices` (matrices, c) and, where launch decided how many
directions get gains, `used` (matrices, 1). A kernel that is not stacked has one matrix.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.extraction.launch import Ranking
from tsd_jax.storage.atomic import write_atomically

_UNREADABLE = (LookupError, ValueError, TypeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class LaunchRecord:
    """What launch found in the matrices of one kernel.

    Attributes:
      sigma: (matrices, k) singular values, descending.
      rates: (matrices, k) change rates, in the order of sigma.
      indices: (matrices, c) launched directions, best first.
      used: (matrices,) how many of them have gains, where launch decided it.
    """

    sigma: np.ndarray
    rates: np.ndarray
    indices: np.ndarray
    used: np.ndarray | None = None

    @property
    def gains(self) -> np.ndarray:
        """(matrices, c) whether a launched direction may have a gain."""
        count = self.indices.shape[-1]
        used = count if self.used is None else self.used[:, None]
        return np.broadcast_to(np.arange(count) < used, self.indices.shape)


def write_rankings(file: Path, rankings: Mapping[str, Ranking]) -> None:
    """Write {kernel path: what launch found} as directions.npz, atomically."""
    arrays = {
        f"{kernel}/{field}": np.asarray(value).reshape(-1, value.shape[-1])
        for kernel, ranking in rankings.items()
        for field, value in vars(ranking).items()
        if value is not None
    }

    def write(part: Path) -> None:
        with part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    write_atomically(file, write)


def read_directions(file: str | Path) -> dict[str, LaunchRecord]:
    """Read directions.npz: {kernel path: what launch found}.

    Raises:
      InputError: the file is missing, or is not what a launch writes.
    """
    try:
        # Opened here: NumPy leaves the file open if it is not an archive.
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        kernels = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        return {kernel: _record(arrays, kernel) for kernel in kernels}
    except FileNotFoundError:
        raise InputError(
            f"{file} does not exist; give the directions.npz of a run that launched"
        ) from None
    except _UNREADABLE as error:
        raise InputError(
            f"{file} is not the directions.npz of a run ({error}): give another file"
        ) from None


def _record(arrays: Mapping[str, np.ndarray], kernel: str) -> LaunchRecord:
    used = arrays.get(f"{kernel}/used")
    return LaunchRecord(
        sigma=arrays[f"{kernel}/sigma"],
        rates=arrays[f"{kernel}/rates"],
        indices=arrays[f"{kernel}/indices"],
        used=None if used is None else used[:, 0],
    )
