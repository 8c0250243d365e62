"""The launch: rank every kernel's directions once, and start what trains on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Adapters, AllDirections, Directions, Leaf
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import Spec
from tsd_jax.core.spectra import Ranked, rank_directions

EPSILON = 1e-6


class Ranking(struct.PyTreeNode):
    """Report what launch saw in one kernel; float32, shapes (*batch, ...).

    Attributes:
      sigma: singular values, descending, (*batch, k).
      rates: change rate of every core direction, (*batch, k).
      indices: the launched directions, best first, (*batch, c), int32.
    """

    sigma: Leaf
    rates: Leaf
    indices: Leaf


def _start(
    ranked: Ranked, a: jax.Array, b: jax.Array, *, method: Method, scale: float
) -> tuple[jax.Array, jax.Array, Directions]:
    """Give A, B and the frozen factors of one matrix right after launch.

    Init: A = P_I sqrt(sigma_I / gamma), B = sqrt(sigma_I / gamma) Q_I^T, with the
    offset o = -sigma_I taking the same out of the untouched kernel again. Keep: the
    old gamma A B stays beside it, frozen, with offset 1.
    """
    rank = a.shape[-1]
    left, right = ranked.left, ranked.right
    offset = jnp.zeros_like(ranked.chosen)
    kept = (a, scale * b.T)
    if method.restart:
        sigma = ranked.chosen[:rank]
        root = jnp.sqrt(sigma / scale)
        a, b = left[:, :rank] * root[None], root[:, None] * right[:, :rank].T
        offset = offset.at[:rank].set(-sigma)
    if method.keep:
        left = jnp.concatenate([left, kept[0]], -1)
        right = jnp.concatenate([right, kept[1]], -1)
        offset = jnp.concatenate([offset, jnp.ones(rank, offset.dtype)])
    return a, b, Directions(left, right, offset)


def _launch_matrix(
    matrices: tuple[jax.Array, jax.Array, jax.Array],
    *,
    method: Method,
    scale: float,
    count: int,
    epsilon: float,
):
    """Launch one matrix: float64 inside, the adapter's type outside."""
    kernel, a, b = matrices
    dtype = a.dtype
    ranked = rank_directions(kernel, a, b, scale=scale, count=count, epsilon=epsilon)
    a, b = a.astype(jnp.float64), b.astype(jnp.float64)
    started = _start(ranked, a, b, method=method, scale=scale)
    report = Ranking(
        ranked.sigma.astype(jnp.float32),
        ranked.rates.astype(jnp.float32),
        ranked.indices,
    )
    return jax.tree.map(lambda x: x.astype(dtype), started), report


def _launch_stack(
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    layout: Layout,
    method: Method,
    scale: float,
    count: int,
    epsilon: float,
):
    """Launch a stored kernel, one matrix of its stack after the other."""
    matrices = layout.to_matrices(kernel)
    batch = matrices.shape[:-2]
    one = functools.partial(
        _launch_matrix, method=method, scale=scale, count=count, epsilon=epsilon
    )
    flat = (x.reshape(math.prod(batch), *x.shape[-2:]) for x in (matrices, a, b))
    results = jax.lax.map(one, tuple(flat))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)


def _out_shardings(a: jax.Array, b: jax.Array):
    """Give the results the shardings the adapter has, where it has named ones."""
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

    frozen = Directions(named(rows, None), named(columns, None), named(None))
    started = (named(rows, None), named(None, columns), frozen)
    return started, Ranking(named(None), named(None), named(None))


def launch(
    params: Mapping,
    adapters: Mapping[str, Adapter],
    spec: Spec,
    *,
    epsilon: float = EPSILON,
) -> tuple[Adapters, AllDirections, dict[str, Ranking]]:
    """Rank every kernel's directions and start the dash phase from them.

    Call it once, between two steps. Extraction runs jit-compiled in float64
    whatever the global settings; results come back in the adapters' types and
    shardings. Resetting optimizer moments is the optimizer's part: see
    `tsd_jax.training.optimizer.reset_moments`.

    Args:
      params: the parameter tree with the untouched kernels.
      adapters: {path: Adapter} as trained so far.
      spec: of `make_spec`; its method says what is started.
      epsilon: of the change rate |p_i| / (sigma_i + epsilon).

    Returns:
      adapters (gains zero; A, B new where the method restarts them), directions, and
      {path: Ranking}.

    Raises:
      InputError: a kernel is not in the tree, or the method has no launch.

    Source: arXiv:2409.01035, sections 3 to 5.
    """
    if not spec.method.launches:
        raise InputError(f"method {spec.method.name!r} has no launch")
    kernels = paths.select(params, spec.paths)
    new_adapters, new_directions, report = {}, {}, {}
    for kernel in spec.kernels:
        adapter = adapters[kernel.path]
        run = jax.jit(
            _launch_stack,
            static_argnames=("layout", "method", "scale", "count", "epsilon"),
            out_shardings=_out_shardings(adapter.a, adapter.b),
        )
        with jax.enable_x64(True):
            (a, b, frozen), ranking = run(
                kernels[kernel.path],
                adapter.a,
                adapter.b,
                layout=kernel.layout,
                method=spec.method,
                scale=kernel.scale,
                count=kernel.ranked,
                epsilon=epsilon,
            )
        if not spec.method.restart:
            a, b = adapter.a, adapter.b
        gain = None if adapter.gain is None else jnp.zeros_like(adapter.gain)
        new_adapters[kernel.path] = adapter.replace(a=a, b=b, gain=gain)
        new_directions[kernel.path] = frozen
        report[kernel.path] = ranking
    return new_adapters, new_directions, report
