"""Spectra of the base kept in a store, so that a second launch decomposes nothing."""

from __future__ import annotations

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Float64, Int, Shaped

from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import Quantized, dequantize
from tsd_jax.extraction.chunks import ChunkPlan
from tsd_jax.extraction.spectra import DenseSpectrum, decompose

_BLOCK = 2**24  # bytes that one thread hashes at a time


@runtime_checkable
class SpectraStore(Protocol):
    """A store of spectra by the fingerprints of their matrices."""

    def load(self, key: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the spectrum of a matrix, or None where the store lacks it.

        Args:
          key: fingerprint of the matrix.
          size: n, its short side.

        Returns:
          Eigenvalues (n,) float64, and eigenvectors (n, n) float32.
        """
        ...

    def save(
        self,
        key: str,
        values: Float64[np.ndarray, "n"],
        vectors: Float32[np.ndarray, "n n"],
    ) -> None:
        """Store the spectrum of a matrix.

        Args:
          key: fingerprint of the matrix.
          values: eigenvalues, (n,), float64.
          vectors: eigenvectors, (n, n), float32.
        """
        ...


def fingerprint(matrix: Shaped[np.ndarray, "in out"]) -> str:
    """Return a name for a matrix made of its shape, type and bits.

    The bits enter as the SHA-256 of the SHA-256s of blocks, which are hashed in
    parallel.

    Args:
      matrix: (in, out), any type.
    """
    content = np.ascontiguousarray(matrix).reshape(-1).view(np.uint8).data
    blocks = [content[at : at + _BLOCK] for at in range(0, len(content), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        digest = hashlib.sha256(b"".join(digests))
    shape = "x".join(map(str, matrix.shape))
    return f"{shape}-{matrix.dtype.name}-{digest.hexdigest()}"


def spectra_of(
    kernel: Float[Array, "..."] | Quantized,
    start: Int[ArrayLike, ""],
    plan: ChunkPlan,
    store: SpectraStore,
) -> DenseSpectrum:
    """Return the spectra of a chunk's matrices, from the store or computed anew.

    Every process loads and saves those of its own devices; if one of them lacks any,
    all processes decompose the chunk.

    Args:
      kernel: as stored.
      start: first matrix of the chunk, (), int32.
      plan: how the stack is cut.
      store: where spectra are kept.

    Returns:
      Eigenvalues (width, n) float64 and eigenvectors (width, n, n) float32.
    """
    size = min(plan.layout.shape(plan.shape)[-2:])
    keys = _keys(kernel, start, plan)
    found = {row: store.load(key, size) for row, key in keys.items()}
    if _in_every_process(all(known is not None for known in found.values())):
        kept = {row: known for row, known in found.items() if known is not None}
        return DenseSpectrum(
            _assemble({row: known[0] for row, known in kept.items()}, plan),
            _assemble({row: known[1] for row, known in kept.items()}, plan),
        )
    values, vectors = _decompose_chunk(kernel, start, plan=plan)
    both = zip(_own_rows(values), _own_rows(vectors), strict=True)
    for (first, some_values), (_, some_vectors) in both:
        pairs = zip(np.asarray(some_values), np.asarray(some_vectors), strict=True)
        for row, pair in enumerate(pairs, first):
            if found[row] is None:
                store.save(keys[row], *pair)
    return DenseSpectrum(values, vectors)


@dataclass(frozen=True)
class _Decompose:
    """The program that decomposes one matrix, as a store keeps it."""

    def __call__(self, matrix: Array) -> tuple[Array, Array]:
        spectrum = decompose(matrix)
        return spectrum.eigenvalues, spectrum.all_vectors.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="plan")
def _decompose_chunk(kernel: Any, start: Array, *, plan: ChunkPlan) -> Any:
    return plan.map(_Decompose(), plan.matrices(kernel, start))


@functools.partial(jax.jit, static_argnames="plan")
def _spread(kernel: Any, start: Array, *, plan: ChunkPlan) -> Array:
    return plan.matrices(kernel, start)


def _keys(kernel: Any, start: Any, plan: ChunkPlan) -> dict[int, str]:
    """Return the fingerprints of this process's matrices of a chunk, by their row."""
    if plan.mesh is None and plan.layout == Layout():
        return {0: fingerprint(np.asarray(dequantize(kernel)))}  # no copy, on a CPU
    rows = _own_rows(_spread(kernel, start, plan=plan))
    return {
        row: fingerprint(matrix)
        for first, part in rows
        for row, matrix in enumerate(np.asarray(part), first)
    }


def _in_every_process(flag: bool) -> bool:
    """Return whether a flag is set in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def _own_rows(array: Array) -> list[tuple[int, Any]]:
    """Return (first row, rows) of every part of an array that this process holds."""
    return [
        (shard.index[0].start or 0, shard.data) for shard in array.addressable_shards
    ]


def _assemble(rows: dict[int, np.ndarray], plan: ChunkPlan) -> Array:
    """Return a chunk (width, ...) made of rows, each on the device it belongs to."""
    if not isinstance(plan.sharding, NamedSharding):
        parts = [rows[row][None] for row in range(plan.width)]
        return jax.device_put(parts[0] if len(parts) == 1 else np.concatenate(parts))
    shape = (plan.width, *next(iter(rows.values())).shape)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(plan.width)
        return np.stack([rows[row] for row in range(start, stop)])

    return jax.make_array_from_callback(shape, plan.sharding, part)
