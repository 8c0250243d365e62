"""The launch: rank every kernel's directions once, and start what trains on them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, AllDirections, Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.core.types import Leaf, Progress
from tsd_jax.extraction.chunks import ChunkPlan, plan_chunks, run_each
from tsd_jax.extraction.devices import run_on_hosts
from tsd_jax.extraction.matrix_launch import MatrixLaunch, Ranking, Started
from tsd_jax.extraction.ranking import EPSILON, RankSettings
from tsd_jax.extraction.settings import Extraction
from tsd_jax.extraction.spectra_cache import spectra_of


class Operands(NamedTuple):
    """What one kernel's launch reads; of a chunk, (width, ...) each.

    Attributes:
      kernel: as stored; of a chunk, its matrices (width, in, out).
      a: A, (*batch, in, r).
      b: B, (*batch, r, out).
      magnitude: m, (*batch, out); None without DoRA.
      noise: what the ranking "random" ranks by, (*batch, k).
      delta: dK to rank by, stored as the kernel is; None for the learned one.
    """

    kernel: Any
    a: Leaf
    b: Leaf
    magnitude: Leaf
    noise: Leaf
    delta: Leaf


def _chunk(operands: Operands, start: Array, plan: ChunkPlan) -> Operands:
    """Return a chunk's matrices and what lies beside them, each (width, ...)."""

    def rows(x: Array | None) -> Array | None:
        return None if x is None else plan.rows(x, start)

    kernel, a, b, magnitude, noise, delta = operands
    return Operands(
        plan.matrices(kernel, start),
        rows(a),
        rows(b),
        rows(magnitude),
        rows(noise),
        None if delta is None else plan.matrices(delta, start),
    )


@functools.partial(jax.jit, static_argnames=("plan", "program"))
def _launch_chunk(operands, start, spectra=None, *, plan, program):
    """Launch a chunk where its matrices are; their spectra may be known."""
    return plan.map(program, *_chunk(operands, start, plan), spectra)


@functools.partial(jax.jit, static_argnames="plan")
def _spread_chunk(operands, start, *, plan):
    """Return a chunk's operands, matrix by matrix over the devices."""
    return _chunk(operands, start, plan)


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


def _launch_kernel(
    operands: Operands,
    adapter: Adapter,
    program: MatrixLaunch,
    extraction: Extraction,
    progress: Callable[[int], None] | None,
) -> tuple[Started, Ranking]:
    """Launch a stored kernel, one chunk of its stack after the other."""
    kernel = operands.kernel
    plan = plan_chunks(
        kernel,
        adapter.kernel.layout,
        memory_budget=extraction.memory_budget,
        matrices_per_device=None if extraction.store is None else 1,
    )
    results = []
    with jax.enable_x64(True):
        run = _chunk_runner(extraction, kernel)
        for start in plan.starts:
            results.append(run(operands, np.int32(start), plan, program))
            if progress is not None:
                if not isinstance(kernel, Tracer):  # wait until the chunk is done
                    jax.block_until_ready(results[-1])
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


def _on_devices(operands, start, plan, program):
    """Launch a chunk on the devices that hold its matrices."""
    return _launch_chunk(operands, start, plan=plan, program=program)


def _on_devices_with_store(operands, start, plan, program, store):
    """Launch a chunk on the devices, with spectra from a store."""
    spectra = spectra_of(operands.kernel, start, plan, store)
    return _launch_chunk(operands, start, spectra, plan=plan, program=program)


def _on_hosts(operands, start, plan, program, store):
    """Launch a chunk on the hosts, with spectra from a store where there is one."""

    def run(matrices, *rest):
        if store is None:
            return run_each(program, matrices, *rest)
        layout = Layout((0,), (1,), (2,))
        local = ChunkPlan(layout, matrices.shape, len(matrices), None, PartitionSpec())
        spectra = spectra_of(matrices, np.int32(0), local, store)
        return run_each(program, matrices, *rest, spectra)

    return run_on_hosts(run, *_spread_chunk(operands, start, plan=plan))


def _chunk_runner(extraction: Extraction, kernel: Any) -> Callable:
    """Return how a chunk is launched: (operands, start, plan, program) -> results."""
    if extraction.on_hosts(kernel):
        return functools.partial(_on_hosts, store=extraction.store)
    if extraction.store is not None:
        return functools.partial(_on_devices_with_store, store=extraction.store)
    return _on_devices


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
            method=spec.method,
            scale=kernel.scale,
            settings=RankSettings(
                count=kernel.ranked,
                epsilon=epsilon,
                ranking=spec.method.ranking,
                solver=extraction.solver,
            ),
            knee_budget=kernel.gains if kernel.gated else None,
        )

        def tell(done: int, before: int = before) -> None:
            assert progress is not None
            progress(before + done, total)

        (a, b, magnitude, frozen), ranking = _launch_kernel(
            Operands(
                kernels[kernel.path],
                adapter.a,
                adapter.b,
                adapter.magnitude,
                _noise(kernel, seed),
                None if deltas is None else deltas[kernel.path],
            ),
            adapter,
            program,
            extraction,
            None if progress is None else tell,
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
