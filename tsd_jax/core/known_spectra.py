"""Spectra of the base from a store, so that a second launch decomposes nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from tsd_jax.core.ranking import decompose
from tsd_jax.core.spectra import Dense
from tsd_jax.core.stacks import Chunks

_LANES = 4  # of 32 bits each


class SpectraStore(Protocol):
    """Keep spectra by the fingerprint of their matrix."""

    def load(self, key: str, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Give (eigenvalues (size,) float64, vectors (size, size) float32), if kept."""
        ...

    def save(self, key: str, values: np.ndarray, vectors: np.ndarray) -> None:
        """Keep a spectrum."""
        ...


def _weights(count: int, seed: int) -> jax.Array:
    """Give odd pseudo-random multipliers, uint32 (count, lanes)."""
    x = jnp.arange(count * _LANES, dtype=jnp.uint32) + jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (x | jnp.uint32(1)).reshape(count, _LANES)


@jax.jit
def fingerprint(matrix: jax.Array) -> jax.Array:
    """Hash a matrix's bits, uint32 (4,), at the speed of reading it.

    Multilinear: bits times pseudo-random odd weights modulo 2^32, along the rows and
    then over them, in four lanes. Two different checkpoints do not meet by chance; it
    does not stand against somebody who wants them to.
    """
    width = {2: jnp.uint16, 4: jnp.uint32}.get(matrix.dtype.itemsize, jnp.uint32)
    bits = lax.bitcast_convert_type(matrix, width).astype(jnp.uint32)
    bits = bits.reshape(matrix.shape[0], -1)
    across, down = _weights(bits.shape[1], 1), _weights(bits.shape[0], 2)
    lanes = [
        jnp.sum(
            jnp.sum(bits * across[None, :, n], 1, dtype=jnp.uint32) * down[:, n],
            dtype=jnp.uint32,
        )
        for n in range(_LANES)
    ]
    return jnp.stack(lanes)


def key_of(print_: np.ndarray, shape: tuple[int, ...], dtype: Any) -> str:
    """Name a matrix by its fingerprint, shape and type."""
    bits = "".join(f"{int(lane):08x}" for lane in print_)
    return f"{'x'.join(map(str, shape))}-{jnp.dtype(dtype).name}-{bits}"


@dataclass(frozen=True)
class _Fingerprint:
    def __call__(self, matrix: jax.Array) -> jax.Array:
        return fingerprint(matrix)


@dataclass(frozen=True)
class _Decompose:
    def __call__(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        spectrum = decompose(matrix)
        return spectrum.eigenvalues, spectrum.all_vectors.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("chunks", "program"))
def _map(matrices: jax.Array, *, chunks: Chunks, program: Any) -> Any:
    return chunks.map(program, matrices)


def _everywhere(flag: bool) -> bool:
    """Tell whether a flag is set in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def spectra_of(matrices: jax.Array, chunks: Chunks, store: SpectraStore) -> Dense:
    """Give the spectra of a chunk's matrices (width, in, out), from the store or anew.

    Every process loads and saves those of its own devices; if one of them lacks any,
    all decompose the chunk.

    Returns:
      Dense of eigenvalues (width, n) float64 and vectors (width, n, n) float32.
    """
    shape = matrices.shape[1:]
    size, width = min(shape), matrices.shape[0]
    prints = _map(matrices, chunks=chunks, program=_Fingerprint())
    keys = {
        row: key_of(one, shape, matrices.dtype)
        for start, part in _own_rows(prints)
        for row, one in enumerate(np.asarray(part), start)
    }
    found = {row: store.load(key, size) for row, key in keys.items()}
    if _everywhere(all(known is not None for known in found.values())):
        kept = {row: known for row, known in found.items() if known is not None}
        return Dense(
            _placed({row: known[0] for row, known in kept.items()}, width, chunks),
            _placed({row: known[1] for row, known in kept.items()}, width, chunks),
        )
    values, vectors = _map(matrices, chunks=chunks, program=_Decompose())
    for (start, some), (_, many) in zip(
        _own_rows(values), _own_rows(vectors), strict=True
    ):
        for row, pair in enumerate(
            zip(np.asarray(some), np.asarray(many), strict=True), start
        ):
            if found[row] is None:
                store.save(keys[row], *pair)
    return Dense(values, vectors)


def _own_rows(array: jax.Array) -> list[tuple[int, Any]]:
    """List (first row, rows) of the parts of an array this process has."""
    return [
        (shard.index[0].start or 0, shard.data) for shard in array.addressable_shards
    ]


def _placed(rows: dict[int, np.ndarray], width: int, chunks: Chunks) -> jax.Array:
    """Put rows together as a chunk (width, ...), each on the device it belongs to."""
    if not isinstance(chunks.sharding, NamedSharding):
        return jnp.stack([rows[row] for row in range(width)])
    one = next(iter(rows.values()))

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(width)
        return np.stack([rows[row] for row in range(start, stop)])

    return jax.make_array_from_callback((width, *one.shape), chunks.sharding, part)
