"""Stacked kernels over all devices: chunks of whole matrices, each on one device.

A kernel may be sharded along any of its axes, while decompositions need whole matrices.
Its axes are exchanged by all-to-all, one mesh axis at a time, so that no device ever
holds more than its own matrices of one chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import Quantized, dequantize, stored

MEMORY_BUDGET = 2**26
"""Bytes of whole matrices that a device may hold for extraction at a time."""

Program = Callable[..., Any]
"""Arrays of one matrix each -> a tree of arrays; hashable, static under jit."""


@dataclass(frozen=True)
class ChunkPlan:
    """How a stored kernel's stack is cut into chunks; hashable, static under jit.

    Attributes:
      layout: roles of the stored kernel's axes.
      shape: shape of the stored kernel.
      width: matrices in a chunk, a multiple of the number of devices.
      mesh: mesh of the devices, or None for a single device.
      spec: how the stored kernel is partitioned over the mesh.
    """

    layout: Layout
    shape: tuple[int, ...]
    width: int
    mesh: Mesh | None
    spec: PartitionSpec

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return tuple(self.shape[axis] for axis in self.layout.batch)

    @property
    def count(self) -> int:
        """Number of matrices."""
        return math.prod(self.batch)

    @property
    def starts(self) -> range:
        """First matrix of every chunk; the last chunk may reach past the end."""
        return range(0, self.count, self.width)

    @property
    def sharding(self) -> NamedSharding | None:
        """Sharding of a chunk's results: matrix by matrix over all devices."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(self._chunk_axes))

    def indices(self, start: Int[ArrayLike, ""]) -> Int[Array, "width"]:
        """Return the matrices of a chunk, (width,); past the end the last one repeats.

        Args:
          start: first matrix of the chunk, ().
        """
        return jnp.minimum(start + jnp.arange(self.width), self.count - 1)

    def rows(
        self, stacked: Shaped[ArrayLike, "..."], start: Int[ArrayLike, ""]
    ) -> Shaped[Array, "width ..."]:
        """Return a chunk (width, ...) of a small array.

        Args:
          stacked: the array, (*batch, ...).
          start: first matrix of the chunk, ().
        """
        stacked = jnp.asarray(stacked)
        rest = stacked.shape[len(self.batch) :]
        rows = stacked.reshape(self.count, *rest)[self.indices(start)]
        if self.sharding is None:
            return rows
        return lax.with_sharding_constraint(rows, self.sharding)

    def matrices(
        self, kernel: Float[Array, "..."] | Quantized, start: Int[ArrayLike, ""]
    ) -> Float[Array, "width in out"]:
        """Return a chunk (width, in, out) of the stored kernel.

        Args:
          kernel: as stored.
          start: first matrix of the chunk, ().
        """
        if self.mesh is None:
            return self._local(kernel, start)
        spread = jax.shard_map(
            self._local,
            mesh=self.mesh,
            in_specs=(self.spec, PartitionSpec()),
            out_specs=PartitionSpec(self._chunk_axes),
            check_vma=False,
        )
        return spread(kernel, start)

    def map(self, program: Program, *chunks: Any) -> Any:
        """Run a program on every matrix of a chunk, on the device that holds it.

        Args:
          program: what to run on one matrix.
          chunks: trees of arrays (width, ...), or None.
        """
        run = functools.partial(_run_each, program)
        if self.mesh is None:
            return run(*chunks)
        by_matrix = PartitionSpec(self._chunk_axes)
        spread = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=by_matrix,
            out_specs=by_matrix,
            check_vma=False,
        )
        return spread(*chunks)

    def join(self, chunks: list[Any], shardings: Any = None) -> Any:
        """Return the results of all chunks as arrays (*batch, ...).

        Args:
          chunks: trees of arrays (width, ...).
          shardings: of the results, a tree like one of the chunks; None leaves them to
            the compiler.
        """
        return self.joiner(shardings)(chunks)

    def joiner(self, shardings: Any = None) -> Any:
        """Return the jitted function of `join`, the same one for the same shardings.

        Args:
          shardings: see `join`.
        """
        leaves, tree = jax.tree.flatten(shardings)
        return _joiner(self.mesh, self.count, self.batch, tuple(leaves), tree)

    @property
    def _axis_names(self) -> list[tuple[str, ...]]:
        """Mesh axes that cut each axis of the kernel."""
        return _axis_names(self.spec, len(self.shape))

    @property
    def _exchanges(self) -> list[tuple[str, int]]:
        """Pairs (mesh axis, kernel axis) to exchange, an axis's minor one first."""
        return [
            (name, axis)
            for axis in range(len(self.shape))
            if axis not in self.layout.batch
            for name in reversed(self._axis_names[axis])
        ]

    @property
    def _stack_axes(self) -> tuple[str, ...]:
        """Mesh axes that cut the stack itself."""
        return _stack_axes(self.spec, self.layout, len(self.shape))

    @property
    def _free_axes(self) -> tuple[str, ...]:
        """Mesh axes along which the kernel is replicated."""
        assert self.mesh is not None
        used = {name for names in self._axis_names for name in names}
        return tuple(name for name in self.mesh.axis_names if name not in used)

    @property
    def _chunk_axes(self) -> tuple[str, ...]:
        """Mesh axes in the order in which they cut a chunk's first axis."""
        exchanged = (name for name, _ in self._exchanges)
        return (*exchanged, *self._stack_axes, *self._free_axes)

    def _local(
        self, block: Float[Array, "..."] | Quantized, start: Int[ArrayLike, ""]
    ) -> Float[Array, "matrices in out"]:
        """Return this device's matrices of a chunk, from its block of the kernel."""
        x = self._take(block, self._own_indices(start))
        kept = [axis for axis in range(block.ndim) if axis not in self.layout.batch]
        for name, axis in self._exchanges:
            x = lax.all_to_all(x, name, 0, 1 + kept.index(axis), tiled=True)
        inputs = tuple(1 + kept.index(axis) for axis in self.layout.inputs)
        outputs = tuple(1 + kept.index(axis) for axis in self.layout.outputs)
        return Layout((0,), inputs, outputs).to_matrices(x)

    def _own_indices(self, start: Int[ArrayLike, ""]) -> Int[Array, "matrices"]:
        """Return the matrices that this device's group exchanges among itself.

        Devices that hold the same block take different matrices from the start.
        """
        indices = self.indices(start)
        if self.mesh is None or not self._free_axes:
            return indices
        ways = math.prod(self.mesh.shape[name] for name in self._free_axes)
        groups = indices.reshape(-1, ways, self.width // self.mesh.size)
        return groups[:, lax.axis_index(self._free_axes)].reshape(-1)

    def _take(
        self, block: Float[Array, "..."] | Quantized, indices: Int[Array, "matrices"]
    ) -> Float[Array, "own ..."]:
        """Return matrices of the stack, also where the stack itself is sharded.

        Only these matrices of a quantized stack are dequantized.
        """
        batch = self.layout.batch
        if not batch:
            matrix = dequantize(block)
            return jnp.broadcast_to(matrix, (len(indices), *matrix.shape))
        block = jax.tree.map(
            lambda part: jnp.moveaxis(part, batch, range(len(batch))), block
        )
        positions, held = [], jnp.ones(indices.shape, bool)
        for dimension, position in enumerate(jnp.unravel_index(indices, self.batch)):
            names, size = self._axis_names[batch[dimension]], block.shape[dimension]
            if names:
                position = position - lax.axis_index(names) * size
                held &= (position >= 0) & (position < size)
            positions.append(jnp.clip(position, 0, size - 1))
        rows = dequantize(jax.tree.map(lambda part: part[tuple(positions)], block))
        if self.mesh is None or not self._stack_axes:
            return rows
        mask = held.reshape(-1, *(1,) * (rows.ndim - 1))
        own = jnp.where(mask, rows, 0)
        ways = math.prod(self.mesh.shape[name] for name in self._stack_axes)
        parts = own.reshape(-1, ways, self.width // self.mesh.size, *own.shape[1:])
        summed = lax.psum_scatter(parts, self._stack_axes, scatter_dimension=1)
        return summed.reshape(-1, *own.shape[1:])


def plan_chunks(
    kernel: Any,
    layout: Layout,
    *,
    memory_budget: int = MEMORY_BUDGET,
    matrices_per_device: int | None = None,
) -> ChunkPlan:
    """Return how a stored kernel's stack is cut into chunks of whole matrices.

    Args:
      kernel: an array, a `Quantized` one or their ShapeDtypeStructs; sharded or traced.
      layout: roles of its axes.
      memory_budget: bytes of a chunk that a device may hold; a device always takes one
        matrix at least.
      matrices_per_device: matrices that a device takes, whatever the budget; None for
        as many as the budget allows.
    """
    shape = tuple(kernel.shape)
    *batch, fan_in, fan_out = layout.shape(shape)
    mesh, spec = _mesh_and_spec(stored(kernel))
    devices = 1 if mesh is None else mesh.size
    if matrices_per_device is None:
        held = fan_in * fan_out * kernel.dtype.itemsize
        if mesh is not None:  # each part of a sharded stack sends a matrix of its own
            names = _stack_axes(spec, layout, len(shape))
            held *= math.prod(mesh.shape[name] for name in names)
        needed = -(-math.prod(batch) // devices)
        matrices_per_device = max(1, min(needed, memory_budget // held))
    return ChunkPlan(layout, shape, matrices_per_device * devices, mesh, spec)


def _mesh_and_spec(array: Any) -> tuple[Mesh | None, PartitionSpec]:
    """Return the mesh an array is sharded over, None for one device, and its spec."""
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None, PartitionSpec()
    if sharding.mesh.size == 1:
        return None, PartitionSpec()
    return sharding.mesh, sharding.spec


def _axis_names(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """Return the mesh axes that cut each axis of an array of rank `ndim`."""
    padded = (*spec, *(None,) * ndim)[:ndim]
    return [
        () if names is None else (names,) if isinstance(names, str) else names
        for names in padded
    ]


def _stack_axes(spec: PartitionSpec, layout: Layout, ndim: int) -> tuple[str, ...]:
    """Return the mesh axes that cut a kernel's batch axes."""
    names = _axis_names(spec, ndim)
    return tuple(name for axis in layout.batch for name in names[axis])


@functools.cache
def _joiner(
    mesh: Mesh | None, count: int, batch: tuple[int, ...], shardings: tuple, tree: Any
) -> Any:
    """Return the function that joins chunks; cached, so that jit compiles it once."""

    def leaf(*rows: Array) -> Array:
        if mesh is not None and shardings:  # they are small: replicate them first
            replicated = NamedSharding(mesh, PartitionSpec())
            rows = tuple(lax.with_sharding_constraint(x, replicated) for x in rows)
        stacked = jnp.concatenate(rows)[:count]
        return stacked.reshape(*batch, *stacked.shape[1:])

    def join(chunks: list[Any]) -> Any:
        return jax.tree.map(leaf, *chunks)

    return jax.jit(join, out_shardings=jax.tree.unflatten(tree, shardings))


def _run_each(program: Program, *parts: Any) -> Any:
    """Run `program` on one matrix after the other."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return lax.map(lambda one: program(*one), parts)
    single = program(*jax.tree.map(lambda x: x[0], parts))  # no loop, and no copy
    return jax.tree.map(lambda x: x[None], single)


@functools.partial(jax.jit, static_argnums=0)
def run_each(program: Program, *parts: Any) -> Any:
    """Run a program on every matrix of some arrays, on the device that holds them.

    Args:
      program: what to run on one matrix.
      parts: trees of arrays (k, ...), or None.
    """
    return _run_each(program, *parts)
