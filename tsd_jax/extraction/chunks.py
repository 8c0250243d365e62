"""Stacked kernels over all devices: a chunk of whole matrices at a time, each on one.

A kernel may be sharded along any of its axes; decompositions want whole matrices. The
axes are exchanged one mesh axis at a time by all-to-all, so that no device ever holds
more than its own matrices of one chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import dequantize, stored

MEMORY_BUDGET = 2**26
"""Bytes of whole matrices that a device may hold for extraction at a time."""

Program = Callable[..., Any]
"""Arrays of one matrix each -> a tree of arrays; hashable, static under jit."""


@dataclass(frozen=True)
class ChunkPlan:
    """Say how a stack is cut: hashable, static under jit.

    Attributes:
      layout: of the stored kernel. shape: its shape.
      width: matrices of a chunk, a multiple of the number of devices.
      mesh: of the devices, or None for a single one. spec: of the stored kernel.
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
        """First matrix of every chunk; the last one may reach past the end."""
        return range(0, self.count, self.width)

    @property
    def sharding(self) -> NamedSharding | None:
        """Where a chunk's results lie: matrix by matrix over all devices."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(self._order))

    def indices(self, start: jax.Array) -> jax.Array:
        """Return the matrices of a chunk, the last one again past the end; (width,)."""
        return jnp.minimum(start + jnp.arange(self.width), self.count - 1)

    def rows(self, stacked: jax.Array, start: jax.Array) -> jax.Array:
        """Return a chunk (width, ...) of a small array (*batch, ...)."""
        rest = stacked.shape[len(self.batch) :]
        rows = stacked.reshape(self.count, *rest)[self.indices(start)]
        if self.sharding is None:
            return rows
        return lax.with_sharding_constraint(rows, self.sharding)

    def matrices(self, kernel: jax.Array, start: jax.Array) -> jax.Array:
        """Return a chunk (width, in, out) of the stored kernel."""
        if self.mesh is None:
            return self._local(kernel, start)
        spread = jax.shard_map(
            self._local,
            mesh=self.mesh,
            in_specs=(self.spec, PartitionSpec()),
            out_specs=PartitionSpec(self._order),
            check_vma=False,
        )
        return spread(kernel, start)

    def map(self, program: Program, *chunks: Any) -> Any:
        """Run `program` on every matrix of a chunk, each where it lies."""
        run = functools.partial(_each, program)
        if self.mesh is None:
            return run(*chunks)
        place = PartitionSpec(self._order)
        spread = jax.shard_map(
            run, mesh=self.mesh, in_specs=place, out_specs=place, check_vma=False
        )
        return spread(*chunks)

    def join(self, chunks: list[Any], shardings: Any = None) -> Any:
        """Put the results of all chunks together, (*batch, ...), where they shall lie.

        Args:
          chunks: trees of arrays (width, ...). shardings: a tree like one of them.
        """
        return self.joiner(shardings)(chunks)

    def joiner(self, shardings: Any = None) -> Any:
        """Return the jitted function of `join`, the same one for the same shardings."""
        leaves, tree = jax.tree.flatten(shardings)
        return _joiner(self.mesh, self.count, self.batch, tuple(leaves), tree)

    @property
    def _names(self) -> list[tuple[str, ...]]:
        """Name the mesh axes of every axis of the kernel."""
        spec = (*self.spec, *(None,) * len(self.shape))[: len(self.shape)]
        return [
            () if names is None else (names,) if isinstance(names, str) else names
            for names in spec
        ]

    @property
    def _moves(self) -> list[tuple[str, int]]:
        """List (mesh axis, kernel axis) to exchange, the minor one of an axis first."""
        return [
            (name, axis)
            for axis in range(len(self.shape))
            if axis not in self.layout.batch
            for name in reversed(self._names[axis])
        ]

    @property
    def _stacked(self) -> tuple[str, ...]:
        """Name the mesh axes that cut the stack itself."""
        return tuple(name for axis in self.layout.batch for name in self._names[axis])

    @property
    def _free(self) -> tuple[str, ...]:
        """Name the mesh axes along which the kernel is repeated."""
        assert self.mesh is not None
        used = {name for names in self._names for name in names}
        return tuple(name for name in self.mesh.axis_names if name not in used)

    @property
    def _order(self) -> tuple[str, ...]:
        """Order the mesh axes as the chunk's first axis is cut by them."""
        return (*(name for name, _ in self._moves), *self._stacked, *self._free)

    def _local(self, block: jax.Array, start: jax.Array) -> jax.Array:
        """Return this device's matrices of a chunk, from its block of the kernel."""
        x = self._take(block, self._share(start))
        kept = [axis for axis in range(block.ndim) if axis not in self.layout.batch]
        for name, axis in self._moves:
            x = lax.all_to_all(x, name, 0, 1 + kept.index(axis), tiled=True)
        inputs = tuple(1 + kept.index(axis) for axis in self.layout.inputs)
        outputs = tuple(1 + kept.index(axis) for axis in self.layout.outputs)
        return Layout((0,), inputs, outputs).to_matrices(x)

    def _share(self, start: jax.Array) -> jax.Array:
        """Return the matrices that the devices beside which this one stands exchange.

        Devices that hold the same block take different matrices from the beginning.
        """
        indices = self.indices(start)
        if self.mesh is None or not self._free:
            return indices
        ways = math.prod(self.mesh.shape[name] for name in self._free)
        shares = indices.reshape(-1, ways, self.width // self.mesh.size)
        return shares[:, lax.axis_index(self._free)].reshape(-1)

    def _take(self, block: Any, indices: jax.Array) -> jax.Array:
        """Return matrices of the stack, where the stack itself is sharded too.

        Of a quantized stack no more than these become floats.
        """
        batch = self.layout.batch
        if not batch:
            block = dequantize(block)
            return jnp.broadcast_to(block, (len(indices), *block.shape))
        block = jax.tree.map(
            lambda part: jnp.moveaxis(part, batch, range(len(batch))), block
        )
        places, here = [], jnp.ones(indices.shape, bool)
        for dimension, place in enumerate(jnp.unravel_index(indices, self.batch)):
            names, size = self._names[batch[dimension]], block.shape[dimension]
            if names:
                place = place - lax.axis_index(names) * size
                here &= (place >= 0) & (place < size)
            places.append(jnp.clip(place, 0, size - 1))
        rows = dequantize(jax.tree.map(lambda part: part[tuple(places)], block))
        if self.mesh is None or not self._stacked:
            return rows
        mask = here.reshape(-1, *(1,) * (rows.ndim - 1))
        own = jnp.where(mask, rows, 0)
        ways = math.prod(self.mesh.shape[name] for name in self._stacked)
        parts = own.reshape(-1, ways, self.width // self.mesh.size, *own.shape[1:])
        summed = lax.psum_scatter(parts, self._stacked, scatter_dimension=1)
        return summed.reshape(-1, *own.shape[1:])


@functools.cache
def _joiner(
    mesh: Mesh | None, count: int, batch: tuple[int, ...], places: tuple, tree: Any
) -> Any:
    """Build the function that joins chunks; one object, so that jit knows it again."""

    def leaf(*rows: jax.Array) -> jax.Array:
        if mesh is not None and places:  # small: no other way is found between them
            everywhere = NamedSharding(mesh, PartitionSpec())
            rows = tuple(lax.with_sharding_constraint(x, everywhere) for x in rows)
        whole = jnp.concatenate(rows)[:count]
        return whole.reshape(*batch, *whole.shape[1:])

    def together(chunks: list[Any]) -> Any:
        return jax.tree.map(leaf, *chunks)

    return jax.jit(together, out_shardings=jax.tree.unflatten(tree, places))


def plan_chunks(
    kernel: jax.Array, layout: Layout, *, memory_budget: int = MEMORY_BUDGET
) -> ChunkPlan:
    """Cut a stored kernel's stack into chunks of whole matrices.

    Args:
      kernel: sharded or not, quantized or not, or traced.
      layout: of its axes.
      memory_budget: bytes a device may hold of a chunk; one matrix is the least.
    """
    shape = tuple(kernel.shape)
    *batch, fan_in, fan_out = layout.shape(shape)
    count = math.prod(batch)
    sharding = None
    if not isinstance(stored(kernel), Tracer):
        sharding = getattr(stored(kernel), "sharding", None)
    mesh, spec = None, PartitionSpec()
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        mesh, spec = sharding.mesh, sharding.spec
    if mesh is not None and mesh.size == 1:
        mesh, spec = None, PartitionSpec()
    devices = 1 if mesh is None else mesh.size
    plan = ChunkPlan(layout, shape, devices, mesh, spec)
    held = fan_in * fan_out * kernel.dtype.itemsize
    if mesh is not None:  # a stack cut by layers sends one matrix for each of its parts
        held *= math.prod(mesh.shape[name] for name in plan._stacked)
    each = max(1, min(-(-count // devices), memory_budget // held))
    return dataclasses.replace(plan, width=each * devices)


def _each(program: Program, *parts: Any) -> Any:
    """Run `program` on one matrix after the other."""
    if jax.tree.leaves(parts)[0].shape[0] > 1:
        return lax.map(lambda one: program(*one), parts)
    alone = program(*jax.tree.map(lambda x: x[0], parts))  # no loop, and no copy
    return jax.tree.map(lambda x: x[None], alone)


@functools.partial(jax.jit, static_argnums=0)
def map_here(program: Program, *parts: Any) -> Any:
    """Run `program` on every matrix of arrays (k, ...), on the device they are on."""
    return _each(program, *parts)


def on_hosts(run: Callable[..., Any], *chunks: Any) -> Any:
    """Run a chunk's matrices on the CPUs of the hosts that have them.

    For devices without float64. Every process computes its own devices' matrices;
    nothing is exchanged and nothing compiled for the devices.

    Args:
      run: arrays (k, ...) of some matrices, on the CPU -> a tree of arrays (k, ...).
      chunks: trees of arrays (width, ...), sharded along the first axis.
    """
    cpu = host_device()
    arrays, tree = jax.tree.flatten(chunks)
    results = []
    with jax.default_device(cpu):
        for shards in zip(*(x.addressable_shards for x in arrays), strict=True):
            local = [
                jax.device_put(jax.device_get(shard.data), cpu) for shard in shards
            ]
            done = run(*jax.tree.unflatten(tree, local))
            results.append((shards[0].device, done))
    sharding, width = arrays[0].sharding, arrays[0].shape[0]
    single = not isinstance(sharding, NamedSharding)

    def joined(*leaves: jax.Array) -> jax.Array:
        pieces = [
            jax.device_put(jax.device_get(leaf), device)
            for (device, _), leaf in zip(results, leaves, strict=True)
        ]
        if single:
            return pieces[0]
        shape = (width, *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return jax.tree.map(joined, *(result for _, result in results))


def host_device() -> Any:
    """Return this process's CPU as a device.

    Raises:
      InputError: JAX was told to use accelerators alone.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise InputError(
            "devices without float64 leave decompositions to the host's CPU, which "
            f"JAX_PLATFORMS={jax.config.jax_platforms!r} leaves out: add ',cpu' to it"  # pyright: ignore[reportAttributeAccessIssue]
        ) from None


@functools.cache
def has_float64(platform: str) -> bool:
    """Return whether a platform's devices compute and decompose in float64.

    Apple's and most accelerators made for neural networks do not.
    """
    return platform in ("cpu", "gpu", "cuda", "rocm")
