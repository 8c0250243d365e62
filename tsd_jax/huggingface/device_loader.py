"""Parameters on their way to their devices: stacks are filled a matrix at a time.

A stacked kernel never exists as a whole on the host. It is allocated on its devices and
filled by donated updates; each process brings the parts of its own devices only. A
parameter that is small or not stacked is placed in one step.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Slices = tuple[slice, ...]
Encode = Callable[[jax.Array], Any]
"""Matrices (..., in, out) -> a tree of arrays with as many axes; hashable."""

AT_ONCE = 2**25
"""Bytes up to which a device's part of a stack is placed in one step."""
AHEAD = 2**28
"""Bytes that are read before they are needed; at least one step's."""
READERS = 4
"""Default number of reading threads."""

_LOCAL = PartitionSpec("local")
Job = TypeVar("Job")


class DeviceLoader:
    """Places one parameter on its devices, step by step.

    Args:
      shape: of the parameter, with at least one axis.
      dtype: of the blocks that are put.
      depth: number of its first axes that stack matrices.
      sharding: of the parameter; None for the default device, uncommitted.
      encode: applied to the matrices on their devices; the tree it returns is placed.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        depth: int,
        sharding: NamedSharding | None = None,
        encode: Encode | None = None,
    ):
        self._shape, self._sharding, self._encode = shape, sharding, encode
        everything = {None: (slice(None),) * len(shape)}
        indices = everything
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
        # Devices that hold the same part share one read; slices are not hashable.
        self._parts: dict[str, tuple[Slices, list[Any]]] = {}
        for device, index in indices.items():
            slices = _explicit(index or (), shape)
            self._parts.setdefault(str(slices), (slices, []))[1].append(device)
        first = next(iter(self._parts.values()))[0]
        self._local = tuple(part.stop - part.start for part in first)
        self._mesh = None
        if sharding is not None:
            self._mesh = Mesh(np.array(list(indices)), ("local",))
        size = math.prod(self._local) * dtype.itemsize
        at_once = not depth or size <= AT_ONCE
        self._stack = () if at_once else self._local[:depth]
        self.steps = list(np.ndindex(self._stack))
        self.bytes = size * len(self._parts) // max(len(self.steps), 1)
        """Bytes of one step on the host."""
        self._dtype = dtype
        self._placed: Any = None

    def indices(self, step: tuple[int, ...]) -> list[Slices]:
        """Return the distinct parts of the parameter that a step brings."""
        return [
            (
                *(slice(p.start + i, p.start + i + 1) for p, i in zip(index, step)),  # noqa: B905
                *index[len(step) :],
            )
            for index, _ in self._parts.values()
        ]

    def put(self, step: tuple[int, ...], blocks: Sequence[np.ndarray]) -> None:
        """Place the parts of one step.

        Args:
          step: one of `steps`.
          blocks: the values of the parts, in the order of `indices`.
        """
        piece = self._put_apart(blocks)
        if not step:
            run = functools.partial(_encoded, encode=self._encode, mesh=self._mesh)
            self._placed = piece if self._encode is None else run(piece)
            return
        if self._placed is None:
            self._placed = self._allocate(piece)
        jax.block_until_ready(self._placed)  # one update at a time is under way
        position = tuple(np.int32(i) for i in step)
        self._placed = _fill(
            self._placed, piece, position, encode=self._encode, mesh=self._mesh
        )

    def finish(self) -> Any:
        """Return the parameter, after all steps."""
        sharding = self._sharding
        if sharding is None:
            return self._placed
        shapes: Any = jax.ShapeDtypeStruct(self._shape, self._dtype)
        if self._encode is not None:
            shapes = jax.eval_shape(self._encode, shapes)

        def joined(shape: jax.ShapeDtypeStruct, local: jax.Array) -> jax.Array:
            pieces = [shard.data for shard in local.addressable_shards]
            return jax.make_array_from_single_device_arrays(
                shape.shape, sharding, pieces
            )

        return jax.tree.map(joined, shapes, self._placed)

    def _put_apart(self, blocks: Sequence[np.ndarray]) -> jax.Array:
        """Put each device's part on it: one array, sharded along its first axis."""
        if self._mesh is None:
            return jnp.asarray(blocks[0])
        pieces = {
            device: jax.device_put(block, device)
            for (_, devices), block in zip(self._parts.values(), blocks, strict=True)
            for device in devices
        }
        ordered = [pieces[device] for device in self._mesh.devices]
        first, *rest = ordered[0].shape
        return jax.make_array_from_single_device_arrays(
            (first * len(ordered), *rest),
            NamedSharding(self._mesh, _LOCAL),
            ordered,
        )

    def _allocate(self, piece: jax.Array) -> Any:
        """Allocate the whole stack on its devices."""
        number = 1 if self._mesh is None else self._mesh.size
        sharding = None if self._mesh is None else NamedSharding(self._mesh, _LOCAL)
        shape = (number * self._local[0], *self._local[1:])
        stack: Any = jax.ShapeDtypeStruct(shape, piece.dtype)
        if self._encode is not None:
            stack = jax.eval_shape(self._encode, stack)
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=sharding), stack
        )


def _explicit(index: Slices, shape: tuple[int, ...]) -> Slices:
    """Return one slice per axis, each with both ends."""
    every = (*index, *(slice(None),) * (len(shape) - len(index)))
    ends = (part.indices(size) for part, size in zip(every, shape, strict=True))
    return tuple(slice(start, stop) for start, stop, _ in ends)


def _on_each_device(run: Callable, mesh: Mesh | None, specs: Any) -> Callable:
    """Return `run` for each device's own part, without communication."""
    if mesh is None:
        return run
    return jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=_LOCAL, check_vma=False
    )


@functools.partial(jax.jit, static_argnames=("encode", "mesh"))
def _encoded(piece: jax.Array, *, encode: Encode, mesh: Mesh | None) -> Any:
    return _on_each_device(encode, mesh, (_LOCAL,))(piece)


@functools.partial(jax.jit, static_argnames=("encode", "mesh"), donate_argnums=0)
def _fill(buffer, piece, position, *, encode: Encode | None, mesh: Mesh | None) -> Any:
    """Write one matrix (1, ..., in, out) of every device into its stack, in place."""

    def put(buffer, piece, position):
        new = piece if encode is None else encode(piece)

        def update(stack: jax.Array, part: jax.Array) -> jax.Array:
            inner = (np.int32(0),) * (stack.ndim - len(position))
            return lax.dynamic_update_slice(stack, part, (*position, *inner))

        return jax.tree.map(update, buffer, new)

    return _on_each_device(put, mesh, (_LOCAL, _LOCAL, PartitionSpec()))(
        buffer, piece, position
    )


def read_ahead(
    jobs: Iterable[tuple[Job, int, Callable[[], Any]]],
    *,
    readers: int = READERS,
    ahead: int = AHEAD,
) -> Iterator[tuple[Job, Any]]:
    """Run jobs in several threads and yield their results in order.

    Args:
      jobs: (what it is, bytes of its result, the function that returns it).
      readers: number of threads.
      ahead: bytes of results that may exist at a time, including the one in use; a
        larger result is made alone.

    Yields:
      (what it is, its result).
    """
    waiting: deque[tuple[Job, int, Any]] = deque()
    held = 0
    with ThreadPoolExecutor(readers, thread_name_prefix="weights") as pool:
        try:
            for job, size, run in jobs:
                while waiting and (held + size > ahead or len(waiting) > 2 * readers):
                    done, spent, future = waiting.popleft()
                    yield done, future.result()
                    held -= spent
                    del future
                waiting.append((job, size, pool.submit(run)))
                held += size
            while waiting:
                done, _, future = waiting.popleft()
                yield done, future.result()
                del future
        finally:
            for *_, future in waiting:
                future.cancel()
