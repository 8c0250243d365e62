"""Spectra of base kernels on disk, under a size limit; damaged files are ignored."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tsd_jax.extraction.spectra_cache import fingerprint

_FORMAT = "tsd_jax spectrum 1"


class SpectraFolder:
    """A cache of one safetensors file per matrix; the least recently used are deleted.

    A file that is truncated, altered, or of another format counts as absent. Failures
    to write are ignored: a cache never stops a run.

    Args:
      folder: created when the first spectrum is saved.
      max_bytes: of all files together; the spectrum of a 4096-wide kernel takes 67 MB.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 32 * 2**30):
        self._folder, self._max_bytes = Path(folder), max_bytes

    def load(self, key: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the spectrum of a matrix, or None if it is absent or damaged.

        Args:
          key: of the matrix.
          size: of the matrix.

        Returns:
          eigenvalues (size,), vectors (size, size).
        """
        file = self._file(key)
        try:
            with safe_open(file, framework="np") as opened:
                header = opened.metadata() or {}
                values = opened.get_tensor("values")
                vectors = opened.get_tensor("vectors")
            os.utime(file)
        except (SafetensorError, OSError):
            return None
        sound = (
            header.get("format") == _FORMAT
            and header.get("key") == key
            and values.shape == (size,)
            and vectors.shape == (size, size)
            and header.get("sum") == _sum(values, vectors)
        )
        return (values, vectors) if sound else None

    def save(self, key: str, values: np.ndarray, vectors: np.ndarray) -> None:
        """Write a spectrum, then delete others until all fit.

        Args:
          key: of the matrix.
          values: eigenvalues (size,).
          vectors: (size, size).
        """
        values = np.ascontiguousarray(values, np.float64)
        vectors = np.ascontiguousarray(vectors, np.float32)
        header = {"format": _FORMAT, "key": key, "sum": _sum(values, vectors)}
        if values.nbytes + vectors.nbytes > self._max_bytes:
            return
        with contextlib.suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
            os.close(handle)
            try:
                save_file({"values": values, "vectors": vectors}, name, header)
                os.replace(name, self._file(key))
            finally:
                Path(name).unlink(missing_ok=True)
            self._make_room()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        """Delete the least recently used files until the rest fits."""
        files = [(file, file.stat()) for file in self._folder.glob("*.safetensors")]
        files.sort(key=lambda pair: pair[1].st_mtime_ns)
        total = sum(stat.st_size for _, stat in files)
        for file, stat in files:
            if total <= self._max_bytes:
                break
            file.unlink(missing_ok=True)
            total -= stat.st_size


def _sum(values: np.ndarray, vectors: np.ndarray) -> str:
    """Return the checksum of a spectrum's arrays."""
    return f"{fingerprint(values)} {fingerprint(vectors)}"
