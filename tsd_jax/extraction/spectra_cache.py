"""Spectra of the base from a store, so that a second launch decomposes nothing."""

from __future__ import annotations

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import dequantize
from tsd_jax.extraction.chunks import ChunkPlan
from tsd_jax.extraction.ranking import decompose
from tsd_jax.extraction.spectra import Dense

_BLOCK = 2**24  # bytes that one thread hashes at a time


class SpectraStore(Protocol):
    """Keep spectra by the fingerprint of their matrix."""

    def load(self, key: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (eigenvalues (size,) float64, vectors (size, size) float32), if kept."""
        ...

    def save(self, key: str, values: np.ndarray, vectors: np.ndarray) -> None:
        """Keep a spectrum."""
        ...


def fingerprint(matrix: np.ndarray) -> str:
    """Name a matrix (in, out) by its bits, shape and type.

    A SHA-256 of the SHA-256s of its blocks, which are hashed side by side.
    """
    content = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data
    blocks = [content[at : at + _BLOCK] for at in range(0, len(content), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        digest = hashlib.sha256(b"".join(parts))
    shape = "x".join(map(str, matrix.shape))
    return f"{shape}-{matrix.dtype.name}-{digest.hexdigest()}"


@dataclass(frozen=True)
class _Decompose:
    def __call__(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        spectrum = decompose(matrix)
        return spectrum.eigenvalues, spectrum.all_vectors.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="chunks")
def _decompose_chunk(kernel: jax.Array, start: jax.Array, *, chunks: ChunkPlan) -> Any:
    return chunks.map(_Decompose(), chunks.matrices(kernel, start))


@functools.partial(jax.jit, static_argnames="chunks")
def _spread(kernel: jax.Array, start: jax.Array, *, chunks: ChunkPlan) -> jax.Array:
    return chunks.matrices(kernel, start)


def _keys(kernel: jax.Array, start: Any, chunks: ChunkPlan) -> dict[int, str]:
    """Name this process's matrices of a chunk: {row: fingerprint}."""
    if chunks.mesh is None and chunks.layout == Layout():
        return {0: fingerprint(np.asarray(dequantize(kernel)))}  # no copy, on a CPU
    rows = _own_rows(_spread(kernel, start, chunks=chunks))
    return {
        row: fingerprint(matrix)
        for first, part in rows
        for row, matrix in enumerate(np.asarray(part), first)
    }


def _everywhere(flag: bool) -> bool:
    """Return whether a flag is set in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def spectra_of(
    kernel: jax.Array, start: Any, chunks: ChunkPlan, store: SpectraStore
) -> Dense:
    """Return the spectra of a chunk's matrices, from the store or anew.

    Every process loads and saves those of its own devices; if one of them lacks any,
    all decompose the chunk.

    Args:
      kernel: as stored. start: first matrix of the chunk, int32 ().
      chunks: how the stack is cut. store: where spectra are kept.

    Returns:
      Dense of eigenvalues (width, n) float64 and vectors (width, n, n) float32.
    """
    size = min(chunks.layout.shape(chunks.shape)[-2:])
    keys = _keys(kernel, start, chunks)
    found = {row: store.load(key, size) for row, key in keys.items()}
    if _everywhere(all(known is not None for known in found.values())):
        kept = {row: known for row, known in found.items() if known is not None}
        return Dense(
            _placed({row: known[0] for row, known in kept.items()}, chunks),
            _placed({row: known[1] for row, known in kept.items()}, chunks),
        )
    values, vectors = _decompose_chunk(kernel, start, chunks=chunks)
    both = zip(_own_rows(values), _own_rows(vectors), strict=True)
    for (first, some), (_, many) in both:
        pairs = zip(np.asarray(some), np.asarray(many), strict=True)
        for row, pair in enumerate(pairs, first):
            if found[row] is None:
                store.save(keys[row], *pair)
    return Dense(values, vectors)


def _own_rows(array: jax.Array) -> list[tuple[int, Any]]:
    """List (first row, rows) of the parts of an array this process has."""
    return [
        (shard.index[0].start or 0, shard.data) for shard in array.addressable_shards
    ]


def _placed(rows: dict[int, np.ndarray], chunks: ChunkPlan) -> jax.Array:
    """Put rows together as a chunk (width, ...), each on the device it belongs to."""
    if not isinstance(chunks.sharding, NamedSharding):
        parts = [rows[row][None] for row in range(chunks.width)]
        return jax.device_put(parts[0] if len(parts) == 1 else np.concatenate(parts))
    shape = (chunks.width, *next(iter(rows.values())).shape)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(chunks.width)
        return np.stack([rows[row] for row in range(start, stop)])

    return jax.make_array_from_callback(shape, chunks.sharding, part)
