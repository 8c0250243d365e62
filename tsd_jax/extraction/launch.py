"""The launch: rank every kernel's directions once, and start what trains on them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, AllDirections, Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method
from tsd_jax.core.quantization import stored
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.core.types import Leaf, Progress
from tsd_jax.extraction.chunks import (
    MEMORY_BUDGET,
    ChunkPlan,
    has_float64,
    map_here,
    on_hosts,
    plan_chunks,
)
from tsd_jax.extraction.deltas import DenseDelta, learned_delta, matrix_norms
from tsd_jax.extraction.knee import knee
from tsd_jax.extraction.ranking import EPSILON, Ranked, rank_delta
from tsd_jax.extraction.restarts import RESTARTS
from tsd_jax.extraction.spectra import Dense
from tsd_jax.extraction.spectra_cache import SpectraStore, spectra_of

Started = tuple[jax.Array, jax.Array, jax.Array | None, Directions]
"""A, B, m (None without DoRA) and the frozen factors of one matrix, after launch."""


class Ranking(struct.PyTreeNode):
    """Report what launch saw in one kernel; float32, shapes (*batch, ...).

    Attributes:
      sigma: singular values, descending, (*batch, k).
      rates: change rate of every core direction, (*batch, k).
      indices: the launched directions, best first, (*batch, c), int32.
      used: how many of them have gains, where launch decides it, (*batch, 1), int32;
        None otherwise.
    """

    sigma: Leaf
    rates: Leaf
    indices: Leaf
    used: Leaf = None


@dataclass(frozen=True)
class MatrixLaunch:
    """Launch one matrix: float64 inside, the adapter's type outside.

    Attributes:
      method: what is started. scale: gamma. count: directions to launch.
      epsilon: of the change rate. solver: see `rank_directions`.
      gains: the most of them a matrix may use, where their number is left to the knee
        of its change rates; 0 where it is fixed.
    """

    method: Method
    scale: float
    count: int
    epsilon: float
    solver: str = "auto"
    gains: int = 0

    def __call__(
        self,
        kernel: jax.Array,
        a: jax.Array,
        b: jax.Array,
        magnitude: jax.Array | None,
        noise: jax.Array,
        change: jax.Array | None,
        spectrum: Dense | None = None,
    ) -> tuple[Started, Ranking]:
        """Return A, B, m and the frozen factors right after launch, and what was seen."""
        dtype = a.dtype
        a, b = a.astype(jnp.float64), b.astype(jnp.float64)
        ranked = rank_delta(
            kernel,
            learned_delta(kernel, a, b, self.scale, magnitude)
            if change is None
            else DenseDelta(change),
            count=self.count,
            epsilon=self.epsilon,
            ranking=self.method.ranking,
            noise=noise,
            solver=self.solver,
            spectrum=spectrum,
        )
        used = knee(ranked.rates, self.gains)[None] if self.gains else None
        a, b, frozen = self._start(ranked, a, b, used)
        if magnitude is not None and self.method.begins_again:
            magnitude = self._norms(kernel, a, b, frozen)
        report = Ranking(
            ranked.sigma.astype(jnp.float32),
            ranked.rates.astype(jnp.float32),
            ranked.indices,
            used,
        )
        started = (a, b, magnitude, frozen)
        return jax.tree.map(lambda x: x.astype(dtype), started), report

    def _norms(
        self, kernel: jax.Array, a: jax.Array, b: jax.Array, frozen: Directions
    ) -> jax.Array:
        """Return m of a kernel begun again: the function is K + dK, so c = 1."""
        along = frozen.offset[:, None] * frozen.right.T
        down = jnp.concatenate([a, frozen.left], -1)
        return matrix_norms(kernel, down, jnp.concatenate([self.scale * b, along]))

    def _start(
        self, ranked: Ranked, a: jax.Array, b: jax.Array, used: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Directions]:
        """Start A and B again where the method says so, and freeze the directions.

        Keep: the old gamma A B stays beside the new one, frozen, with offset 1. Where
        `used` says how many gains there are, the directions that neither they nor the
        offsets need are zero.
        """
        rank = a.shape[-1]
        left, right = ranked.left, ranked.right
        offset = jnp.zeros_like(ranked.chosen)
        kept = (a, self.scale * b.T)
        gate = None
        if used is not None:
            gate = (jnp.arange(self.gains) < used).astype(a.dtype)
            needed = jnp.maximum(used, rank * self.method.restart)
            live = (jnp.arange(left.shape[-1]) < needed)[None]
            left, right = jnp.where(live, left, 0.0), jnp.where(live, right, 0.0)
        if self.method.restart:
            a, b, first = RESTARTS[self.method.start](ranked, rank, self.scale)
            offset = offset.at[:rank].set(first)
        if self.method.keep:
            left = jnp.concatenate([left, kept[0]], -1)
            right = jnp.concatenate([right, kept[1]], -1)
            offset = jnp.concatenate([offset, jnp.ones(rank, offset.dtype)])
        return a, b, Directions(left, right, offset, gate)


def _parts(kernel, a, b, magnitude, noise, change, start, plan):
    """Return a chunk's matrices and what is beside them."""
    beside = (a, b, magnitude, noise)
    rows = (None if x is None else plan.rows(x, start) for x in beside)
    full = None if change is None else plan.matrices(change, start)
    return plan.matrices(kernel, start), *rows, full


@functools.partial(jax.jit, static_argnames=("plan", "program"))
def _launch_chunk(
    kernel, a, b, magnitude, noise, change, start, spectra=None, *, plan, program
):
    """Launch a chunk where its matrices lie; their spectra may be known."""
    parts = _parts(kernel, a, b, magnitude, noise, change, start, plan)
    return plan.map(program, *parts, spectra)


@functools.partial(jax.jit, static_argnames="plan")
def _spread_chunk(kernel, a, b, magnitude, noise, change, start, *, plan):
    """Return a chunk's matrices, and what is beside them, to the devices in turn."""
    return _parts(kernel, a, b, magnitude, noise, change, start, plan)


def _out_shardings(adapter: Adapter):
    """Return the results the shardings the adapter has, where it has named ones."""
    a, b, spec = adapter.a, adapter.b, adapter.kernel
    at_a, at_b = getattr(a, "sharding", None), getattr(b, "sharding", None)
    if not (isinstance(at_a, NamedSharding) and isinstance(at_b, NamedSharding)):
        return None
    if not isinstance(at_a.mesh, Mesh):  # traced: the caller's jit decides
        return None
    mesh, nothing = at_a.mesh, (None,) * a.ndim
    *batch, rows, _ = (*at_a.spec, *nothing)[: a.ndim]
    *_, columns = (*at_b.spec, *nothing)[: b.ndim]

    def named(*axes):
        return NamedSharding(mesh, PartitionSpec(*batch, *axes))

    extra = named(None) if spec.gated else None
    magnitude = named(columns) if spec.dora else None
    frozen = Directions(named(rows, None), named(columns, None), named(None), extra)
    started = (named(rows, None), named(None, columns), magnitude, frozen)
    return started, Ranking(named(None), named(None), named(None), extra)


def _noise(kernel: KernelSpec, seed: int) -> np.ndarray:
    """Return what the ranking "random" ranks by, float32 (*batch, k)."""
    generator = np.random.default_rng((zlib.crc32(kernel.path.encode()), seed))
    size = min(kernel.fan_in, kernel.fan_out)
    return generator.random((*kernel.batch_shape, size), np.float32)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Say how directions are extracted; the result does not depend on it.

    Attributes:
      where: "devices", where the kernels lie; "hosts", on the hosts' CPUs, each host
        its share; "auto", on the devices if they compute in float64.
      solver: see `rank_directions`.
      memory_budget: bytes of whole matrices a device may hold at a time.
      store: where spectra of the base are kept for the next launch, or None.
    """

    where: str = "auto"
    solver: str = "auto"
    memory_budget: int = MEMORY_BUDGET
    store: SpectraStore | None = None

    def __post_init__(self):
        """Refuse what could not be carried out."""
        if self.where not in ("auto", "devices", "hosts"):
            raise InputError(
                f"extraction on {self.where!r}: choose 'auto', 'devices' or 'hosts'"
            )
        if self.solver not in ("auto", "dense", "tridiagonal"):
            raise InputError(
                f"solver {self.solver!r}: choose 'auto', 'dense' or 'tridiagonal'"
            )

    def on_hosts(self, kernel: Any) -> bool:
        """Return whether a kernel's matrices are decomposed on the hosts."""
        kernel = stored(kernel)
        if self.where != "auto" or isinstance(kernel, Tracer):
            return self.where == "hosts"
        devices = getattr(kernel, "devices", lambda: set(jax.devices()))()
        return not all(has_float64(device.platform) for device in devices)


def _launch_kernel(
    kernel: jax.Array,
    adapter: Adapter,
    program: MatrixLaunch,
    extraction: Extraction,
    seed: int,
    progress: Callable[[int], None] | None,
    change: jax.Array | None = None,
):
    """Launch a stored kernel, a chunk of its stack after the other."""
    plan = plan_chunks(
        kernel,
        adapter.kernel.layout,
        memory_budget=extraction.memory_budget if extraction.store is None else 1,
    )
    trained = (adapter.a, adapter.b, adapter.magnitude)
    arrays = (kernel, *trained, _noise(adapter.kernel, seed), change)
    results = []
    with jax.enable_x64(True):
        run = _chunk_runner(extraction, kernel)
        for start in plan.starts:
            results.append(run(arrays, np.int32(start), plan, program))
            if progress is not None:
                if not isinstance(kernel, Tracer):
                    jax.block_until_ready(results[-1])  # or it tells what is only begun
                progress(min(start + plan.width, plan.count))
        return plan.join(results, _out_shardings(adapter))


def check_deltas(method: Method) -> None:
    """Raise InputError unless a method's ranking alone looks at a change."""
    if method.ranking != "rates":
        raise InputError(
            f"directions from a gradient: method {method.name!r} ranks by "
            f"{method.ranking!r}, which looks at no change"
        )
    if method.restart and method.start == "sigma+p":
        raise InputError(
            "directions from a gradient: start='sigma+p' needs the change that "
            "pre-launch made, and a gradient has no size of its own"
        )


def _where_they_lie(arrays, start, plan, program):
    return _launch_chunk(*arrays, start, plan=plan, program=program)


def _on_hosts(arrays, start, plan, program, store):
    def here(matrices, *rest):
        if store is None:
            return map_here(program, matrices, *rest)
        layout = Layout((0,), (1,), (2,))
        alone = ChunkPlan(layout, matrices.shape, len(matrices), None, PartitionSpec())
        spectra = spectra_of(matrices, np.int32(0), alone, store)
        return map_here(program, matrices, *rest, spectra)

    return on_hosts(here, *_spread_chunk(*arrays, start, plan=plan))


def _by_store(arrays, start, plan, program, store):
    spectra = spectra_of(arrays[0], start, plan, store)
    return _launch_chunk(*arrays, start, spectra, plan=plan, program=program)


def _chunk_runner(extraction: Extraction, kernel: Any) -> Callable:
    """Choose how a chunk is launched: (arrays, start, plan, program) -> results."""
    if extraction.on_hosts(kernel):
        return functools.partial(_on_hosts, store=extraction.store)
    if extraction.store is not None:
        return functools.partial(_by_store, store=extraction.store)
    return _where_they_lie


def launch(
    params: Mapping,
    trainable: Trainable,
    spec: Spec,
    *,
    epsilon: float = EPSILON,
    seed: int = 0,
    deltas: Mapping[str, jax.Array] | None = None,
    extraction: Extraction | None = None,
    progress: Progress | None = None,
) -> tuple[Trainable, AllDirections, dict[str, Ranking]]:
    """Rank every kernel's directions and start the dash phase from them.

    Call it once, between two steps. Extraction runs jit-compiled in float64
    whatever the global settings; sharded kernels are spread over all devices a few
    whole matrices at a time; results come back in the adapters' types and
    shardings. Resetting optimizer moments is the optimizer's part: see
    `tsd_jax.training.optimizer.reset_moments`.

    Args:
      params: the parameter tree with the untouched kernels; quantized ones become
        floats a chunk at a time.
      trainable: as trained so far; its `full` parameters go on untouched.
      spec: of `make_spec`; its method says what is started.
      epsilon: of the change rate |p_i| / (sigma_i + epsilon).
      seed: of the ranking "random".
      deltas: {path: dK, stored as the kernel is} to rank by, in place of gamma A B:
        a gradient dL/dK gives directions without pre-launch. Its scale deltas
        nothing; asked for kernel by kernel, in the spec's order.
      extraction: where and how to decompose.
      progress: called after every chunk with the matrices done and their number.

    Returns:
      trainable (gains zero; A, B new where the method restarts them, DoRA's
      magnitudes where it drops what pre-launch learned), directions, and
      {path: Ranking}.

    Raises:
      InputError: a kernel is not in the tree, the method has no launch, or it makes
        nothing of `deltas`.

    Source: arXiv:2409.01035, sections 3 to 5.
    """
    if not spec.method.launches:
        raise InputError(f"method {spec.method.name!r} has no launch")
    if deltas is not None:
        check_deltas(spec.method)
    extraction = extraction or Extraction()
    kernels = paths.select(params, spec.paths)
    total = sum(int(np.prod(kernel.batch_shape)) for kernel in spec.kernels)
    before = 0
    adapters, directions, report = {}, {}, {}
    for kernel in spec.kernels:
        adapter = trainable.adapters[kernel.path]
        program = MatrixLaunch(
            spec.method,
            kernel.scale,
            kernel.ranked,
            epsilon,
            extraction.solver,
            kernel.gains * kernel.gated,
        )

        def tell(done: int, before: int = before) -> None:
            assert progress is not None
            progress(before + done, total)

        (a, b, magnitude, frozen), ranking = _launch_kernel(
            kernels[kernel.path],
            adapter,
            program,
            extraction,
            seed,
            None if progress is None else tell,
            None if deltas is None else deltas[kernel.path],
        )
        before += int(np.prod(kernel.batch_shape))
        if not spec.method.restart:
            a, b = adapter.a, adapter.b
        if not spec.method.begins_again:
            magnitude = adapter.magnitude
        gain = None if adapter.gain is None else jnp.zeros_like(adapter.gain)
        new = adapter.replace(a=a, b=b, gain=gain, magnitude=magnitude)
        adapters[kernel.path] = new
        directions[kernel.path] = frozen
        report[kernel.path] = ranking
    return trainable.replace(adapters=adapters), directions, report
