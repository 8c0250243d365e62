from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tsd_jax.core.layout import Layout
from tsd_jax.extraction.chunks import plan_chunks, run_each
from tsd_jax.extraction.devices import run_on_hosts
from tsd_jax.training.sharding import make_mesh

MESH = (2, 2, 2)
STACK = Layout((0,), (1,), (2,), lifted=(0,))
CASES = {
    "fsdp": (STACK, (5, 8, 12), P(None, "fsdp", None)),
    "fsdp x tensor": (STACK, (5, 8, 12), P(None, "fsdp", "tensor")),
    "both on one axis": (STACK, (5, 8, 12), P(None, ("tensor", "fsdp"))),
    "layers": (STACK, (6, 8, 12), P("fsdp", None, "tensor")),
    "layers over two": (STACK, (8, 8, 12), P(("data", "fsdp"), "tensor")),
    "no stack": (Layout(), (8, 12), P("tensor", "fsdp")),
    "replicated": (STACK, (9, 8, 12), P()),
    "heads": (Layout((0,), (1,), (2, 3)), (3, 8, 2, 6), P(None, "fsdp", "tensor")),
    "experts": (
        Layout((0, 1), (2,), (3,)),
        (3, 4, 8, 6),
        P(None, "tensor", "fsdp", None),
    ),
    "batch last": (Layout((2,), (1,), (0,)), (12, 8, 3), P("tensor", "fsdp", None)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def place(case, seed=0, mesh=MESH):
    layout, shape, spec = case
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    sharding = NamedSharding(make_mesh(mesh), spec)
    return layout, values, jax.device_put(values, sharding)


def matrices_of(layout, values):
    whole = np.transpose(values, layout.order).reshape(layout.shape(values.shape))
    return whole.reshape(-1, *whole.shape[-2:])


@cases
def test_every_matrix_comes_whole_to_one_device(case):
    layout, values, kernel = place(case)
    want = matrices_of(layout, values)
    plan = plan_chunks(kernel, layout, matrices_per_device=1)
    assert plan.width == 8  # one matrix a device
    for start in plan.starts:
        got = jax.jit(plan.matrices)(kernel, np.int32(start))
        places = np.minimum(start + np.arange(8), len(want) - 1)
        np.testing.assert_array_equal(got, want[places])
        assert {shard.data.shape[0] for shard in got.addressable_shards} == {1}


@cases
@pytest.mark.usefixtures("optimized")
def test_no_device_gathers_the_kernel(case):
    """The compiled program holds one matrix a device, or a block, and nothing larger.

    Where the stack itself is cut, one matrix for each of its parts.
    """
    layout, shape, spec = case
    layout, _, kernel = place(case)
    plan = plan_chunks(kernel, layout, matrices_per_device=1)
    text = jax.jit(plan.matrices).lower(kernel, np.int32(0)).compile().as_text() or ""
    assert "all-gather" not in text
    sharded = [names for names in spec if names is not None]
    if sharded and not set(layout.batch) & set(range(len(sharded))):
        assert "all-to-all" in text
    mesh_axes = [spec[axis] for axis in layout.batch if axis < len(spec) and spec[axis]]
    parts = 2 ** sum(1 if isinstance(x, str) else len(x) for x in mesh_axes)
    rows = parts * np.prod(shape) // plan.count
    local = np.prod(kernel.addressable_shards[0].data.shape)
    for dims in re.findall(r"f32\[([\d,]+)\]", text):
        assert np.prod([int(n) for n in dims.split(",")]) <= max(rows, local)


def test_rows_beside_a_chunk():
    layout, _, kernel = place(CASES["experts"])
    plan = plan_chunks(kernel, layout, matrices_per_device=1)
    small = np.arange(12 * 5).reshape(3, 4, 5)
    got = jax.jit(plan.rows)(small, np.int32(8))
    want = small.reshape(12, 5)[[8, 9, 10, 11, 11, 11, 11, 11]]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("budget", "width"), [(1, 8), (8 * 12 * 4 * 2, 16), (10**9, 16)]
)
def test_chunks_respect_a_budget(budget, width):
    layout, _, kernel = place((STACK, (9, 8, 12), P()))
    assert plan_chunks(kernel, layout, memory_budget=budget).width == width


def test_one_device_takes_one_after_the_other():
    kernel = jnp.zeros((5, 4, 6))
    plan = plan_chunks(kernel, STACK, memory_budget=2 * 4 * 6 * 4)
    assert (plan.width, plan.mesh) == (2, None)
    assert list(plan.starts) == [0, 2, 4]


def test_a_mesh_of_one_device_is_none():
    """Whatever its sharding names."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    sharding = NamedSharding(mesh, P("data", "fsdp", "tensor"))
    values = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    kernel = jax.device_put(values, sharding)
    plan = plan_chunks(kernel, STACK)
    assert plan.mesh is None
    got = jax.jit(plan.matrices)(kernel, np.int32(0))
    np.testing.assert_array_equal(got, values)


@dataclass(frozen=True)
class Twice:
    def __call__(self, matrix, row):
        return {"sum": matrix.sum() + row, "matrix": 2 * matrix}


@cases
def test_a_program_runs_where_the_matrix_lies(case):
    layout, values, kernel = place(case)
    plan = plan_chunks(kernel, layout, matrices_per_device=1)
    row = np.arange(plan.count, dtype=np.float32).reshape(plan.batch)

    @jax.jit
    def on_devices(kernel, row, start):
        found = plan.matrices(kernel, start), plan.rows(row, start)
        return plan.map(Twice(), *found)

    def hosted(start):
        spread = jax.jit(lambda k, r: (plan.matrices(k, start), plan.rows(r, start)))
        run = functools.partial(run_each, Twice())
        return run_on_hosts(run, *spread(kernel, row))

    want = matrices_of(layout, values)
    for run in (lambda start: on_devices(kernel, row, start), hosted):
        parts = [run(np.int32(start)) for start in plan.starts]
        got = jax.tree.map(np.asarray, plan.join(parts))
        matrices = got["matrix"].reshape(want.shape)
        np.testing.assert_allclose(matrices, 2 * want)
        sums = want.sum((1, 2)) + row.reshape(-1)
        np.testing.assert_allclose(got["sum"].reshape(-1), sums, rtol=1e-4)


def test_joining_again_compiles_nothing():
    layout, values, kernel = place(CASES["fsdp"])
    plan = plan_chunks(kernel, layout, matrices_per_device=1)
    parts = [np.ones((8, 3), np.float32)] * len(plan.starts)
    whole = NamedSharding(make_mesh(MESH), P())
    for shardings in (None, whole):
        plan.join(parts, shardings)
        programs = plan.joiner(shardings)._cache_size()
        # As the next launch cuts it.
        again = plan_chunks(kernel, layout, matrices_per_device=1)
        assert again.joiner(shardings) is plan.joiner(shardings)
        assert again.join(parts, shardings).shape == (len(values), 3)
        assert again.joiner(shardings)._cache_size() == programs
