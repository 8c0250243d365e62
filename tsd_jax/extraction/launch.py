"""The launch: rank every kernel's directions once, and restart training along them."""

from __future__ import annotations

import functools
import itertools
import math
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
from tsd_jax.core.adapter import (
    Adapter,
    AllDirections,
    Trainable,
    leaves_beside,
)
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.leaves import KernelAxes, leaf_specs, map_leaves
from tsd_jax.core.methods import Method
from tsd_jax.core.promotion import standard_promotion
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.core.types import Leaf, Progress
from tsd_jax.extraction.chunks import ChunkPlan, plan_chunks, run_each
from tsd_jax.extraction.devices import run_on_hosts
from tsd_jax.extraction.launch_checks import check_adapters, check_rates
from tsd_jax.extraction.matrix_launch import MatrixLaunch, Ranking, Started, Trained
from tsd_jax.extraction.ranking import EPSILON, RankSettings
from tsd_jax.extraction.settings import Extraction
from tsd_jax.extraction.spectra_cache import spectra_of


class Operands(NamedTuple):
    """What one kernel's launch reads; of a chunk, (width, ...) each.

    Attributes:
      kernel: as stored; of a chunk, its matrices (width, in, out).
      trained: leaves of its adapter that launch reads, (*batch, ...) each.
      noise: what the ranking "random" ranks by, (*batch, k).
      delta: dK to rank by, stored as the kernel is; None for the learned one.
    """

    kernel: Any
    trained: Trained
    noise: Leaf
    delta: Leaf


def _chunk(operands: Operands, start: Array, plan: ChunkPlan) -> Operands:
    """Return a chunk's matrices and what lies beside them, each (width, ...)."""
    kernel, trained, noise, delta = operands
    trained, noise = jax.tree.map(lambda x: plan.rows(x, start), (trained, noise))
    if delta is not None:
        delta = plan.matrices(delta, start)
    return Operands(plan.matrices(kernel, start), trained, noise, delta)


@functools.partial(jax.jit, static_argnames=("plan", "program"))
def _launch_chunk(operands, start, spectra=None, *, plan, program):
    """Launch a chunk where its matrices are; their spectra may be known."""
    return plan.map(program, *_chunk(operands, start, plan), spectra)


@functools.partial(jax.jit, static_argnames="plan")
def _spread_chunk(operands, start, *, plan):
    """Return a chunk's operands, matrix by matrix over the devices."""
    return _chunk(operands, start, plan)


def _trained(adapter: Adapter) -> Trained:
    """Return what launch reads of an adapter: all but the gains, zero until then."""
    fields = (name for name in leaf_specs(Adapter) if name != "gain")
    return {name: getattr(adapter, name) for name in fields}


def _out_shardings(adapter: Adapter) -> Any:
    """Return the shardings of the results, where the adapter has named ones."""
    a, b, spec = adapter.a, adapter.b, adapter.kernel
    at_a, at_b = getattr(a, "sharding", None), getattr(b, "sharding", None)
    if not (isinstance(at_a, NamedSharding) and isinstance(at_b, NamedSharding)):
        return None
    if not isinstance(at_a.mesh, Mesh):  # traced: the caller's jit decides
        return None
    nothing = (None,) * a.ndim
    *batch, rows, _ = (*at_a.spec, *nothing)[: a.ndim]
    *_, columns = (*at_b.spec, *nothing)[: b.ndim]
    axes = KernelAxes(at_a.mesh, tuple(batch), rows, columns)
    new, frozen = leaves_beside(spec, axes.sharding)
    ranking = Ranking(**map_leaves(Ranking, spec, axes.sharding))
    return (_trained(new), frozen), ranking


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


def _renewed(adapter: Adapter, started: Trained, method: Method) -> Adapter:
    """Return an adapter with what the method renews at launch, the rest as it was."""
    gain = None if adapter.gain is None else jnp.zeros_like(adapter.gain)
    new = {**started, "gain": gain}
    specs = leaf_specs(Adapter).items()
    return adapter.replace(**{f: new[f] for f, s in specs if s.renewed(method)})


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


def _program(
    kernel: KernelSpec, method: Method, epsilon: float, solver: str
) -> MatrixLaunch:
    """Return the program that launches each matrix of a kernel."""
    settings = RankSettings(
        count=kernel.ranked, epsilon=epsilon, ranking=method.ranking, solver=solver
    )
    return MatrixLaunch(
        method=method,
        scale=kernel.scale,
        settings=settings,
        knee_budget=kernel.gains if kernel.gated else None,
    )


def _kernel_progress(
    progress: Progress | None, spec: Spec
) -> dict[str, Callable[[int], None] | None]:
    """Return for every kernel what is called with the number of its matrices done."""
    if progress is None:
        return dict.fromkeys(spec.paths)
    sizes = [math.prod(kernel.batch_shape) for kernel in spec.kernels]
    before, total = itertools.accumulate(sizes, initial=0), sum(sizes)

    def counted_from(start: int) -> Callable[[int], None]:
        return lambda done: progress(start + done, total)

    return dict(zip(spec.paths, map(counted_from, before), strict=False))


def check_deltas(method: Method) -> None:
    """Raise InputError unless a method can rank by deltas from elsewhere.

    Args:
      method: the method, which must rank by change rates and restart from sigma or 0.
    """
    if method.ranking != "rates":
        raise InputError(
            f"directions from a gradient: method {method.name!r} ranks by "
            f"{method.ranking!r}, which does not depend on a gradient; use a method "
            "that ranks by 'rates'"
        )
    if method.restart and method.start == "sigma+p":
        raise InputError(
            "directions from a gradient: start='sigma+p' needs the change that "
            "pre-launch made, and a gradient has no size of its own; use another start"
        )


@standard_promotion
def launch(
    params: Mapping[str, Any],
    trainable: Trainable,
    spec: Spec,
    *,
    epsilon: float = EPSILON,
    seed: int = 0,
    deltas: Mapping[str, Any] | None = None,
    extraction: Extraction | None = None,
    progress: Progress | None = None,
) -> tuple[Trainable, AllDirections, dict[str, Ranking]]:
    """Rank every kernel's directions and start the dash phase from them.

    Call it once, between two steps, and then `tsd_jax.reset_moments`. Extraction runs
    jit-compiled in float64 whatever the global settings, a few whole matrices at a time
    over all devices; results have the adapters' types and shardings.

    Args:
      params: parameter tree with the base's kernels, quantized or not.
      trainable: as trained so far, before launch.
      spec: of `make_spec`; its method says what launch does.
      epsilon: epsilon of the change rate |p_i| / (sigma_i + epsilon).
      seed: seed of the ranking "random".
      deltas: {path: dK as stored} to rank by instead of gamma A B, such as gradients
        dL/dK, whose scale has no effect; read one by one, in the spec's order.
      extraction: where and how to decompose.
      progress: called after every chunk.

    Returns:
      What trains next (gains zero; A, B and m new where the method renews them), the
      frozen directions, and {path: Ranking}.

    Raises:
      InputError: the method has no launch or cannot use `deltas`; a kernel is missing;
        or, unless traced, an adapter is not finite, has nonzero gains and so launched
        before, or has learned nothing to rank directions by.

    Source: arXiv:2409.01035, sections 3 to 5.
    """
    if not spec.method.launches:
        raise InputError(f"method {spec.method.name!r} has no launch")
    if deltas is not None:
        check_deltas(spec.method)
    learned, extraction = deltas is None, extraction or Extraction()
    kernels = paths.select(params, spec.paths)
    check_adapters(trainable, spec, ranks_learned=learned and spec.method.needs_delta)
    report_done = _kernel_progress(progress, spec)
    adapters, directions, report = {}, {}, {}
    for kernel in spec.kernels:
        path, adapter = kernel.path, trainable.adapters[kernel.path]
        delta = None if deltas is None else deltas[path]
        noise = _noise(kernel, seed)
        operands = Operands(kernels[path], _trained(adapter), noise, delta)
        program = _program(kernel, spec.method, epsilon, extraction.solver)
        (started, directions[path]), report[path] = _launch_kernel(
            operands, adapter, program, extraction, report_done[path]
        )
        check_rates(path, report[path].rates, spec.method, learned=learned)
        adapters[path] = _renewed(adapter, started, spec.method)
    return trainable.replace(adapters=adapters), directions, report
