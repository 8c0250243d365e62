from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.trees import small_spec, trained
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.extraction.chunks import (
    has_float64,
    host_device,
    map_here,
    on_hosts,
    plan_chunks,
)
from tsd_jax.extraction.launch import (
    Extraction,
    _launch_chunk,
    _spread_chunk,
    launch,
)
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
    chunks = plan_chunks(kernel, layout, memory_budget=1)
    assert chunks.width == 8  # one matrix a device
    for start in chunks.starts:
        got = jax.jit(chunks.matrices)(kernel, np.int32(start))
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
    chunks = plan_chunks(kernel, layout, memory_budget=1)
    text = jax.jit(chunks.matrices).lower(kernel, np.int32(0)).compile().as_text() or ""
    assert "all-gather" not in text
    sharded = [names for names in spec if names is not None]
    if sharded and not set(layout.batch) & set(range(len(sharded))):
        assert "all-to-all" in text
    mesh_axes = [spec[axis] for axis in layout.batch if axis < len(spec) and spec[axis]]
    parts = 2 ** sum(1 if isinstance(x, str) else len(x) for x in mesh_axes)
    rows = parts * np.prod(shape) // chunks.count
    local = np.prod(kernel.addressable_shards[0].data.shape)
    for dims in re.findall(r"f32\[([\d,]+)\]", text):
        assert np.prod([int(n) for n in dims.split(",")]) <= max(rows, local)


def test_rows_beside_a_chunk():
    layout, _, kernel = place(CASES["experts"])
    chunks = plan_chunks(kernel, layout, memory_budget=1)
    small = np.arange(12 * 5).reshape(3, 4, 5)
    got = jax.jit(chunks.rows)(small, np.int32(8))
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
    chunks = plan_chunks(kernel, STACK, memory_budget=2 * 4 * 6 * 4)
    assert (chunks.width, chunks.mesh) == (2, None)
    assert list(chunks.starts) == [0, 2, 4]


def test_a_mesh_of_one_device_is_none():
    """Whatever its sharding names."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    sharding = NamedSharding(mesh, P("data", "fsdp", "tensor"))
    values = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    kernel = jax.device_put(values, sharding)
    chunks = plan_chunks(kernel, STACK)
    assert chunks.mesh is None
    got = jax.jit(chunks.matrices)(kernel, np.int32(0))
    np.testing.assert_array_equal(got, values)


@dataclass(frozen=True)
class Twice:
    def __call__(self, matrix, row):
        return {"sum": matrix.sum() + row, "matrix": 2 * matrix}


@cases
def test_a_program_runs_where_the_matrix_lies(case):
    layout, values, kernel = place(case)
    chunks = plan_chunks(kernel, layout, memory_budget=1)
    row = np.arange(chunks.count, dtype=np.float32).reshape(chunks.batch)

    @jax.jit
    def on_devices(kernel, row, start):
        found = chunks.matrices(kernel, start), chunks.rows(row, start)
        return chunks.map(Twice(), *found)

    def hosted(start):
        spread = jax.jit(
            lambda k, r: (chunks.matrices(k, start), chunks.rows(r, start))
        )
        run = functools.partial(map_here, Twice())
        return on_hosts(run, *spread(kernel, row))

    want = matrices_of(layout, values)
    for run in (lambda start: on_devices(kernel, row, start), hosted):
        parts = [run(np.int32(start)) for start in chunks.starts]
        got = jax.tree.map(np.asarray, chunks.join(parts))
        matrices = got["matrix"].reshape(want.shape)
        np.testing.assert_allclose(matrices, 2 * want)
        sums = want.sum((1, 2)) + row.reshape(-1)
        np.testing.assert_allclose(got["sum"].reshape(-1), sums, rtol=1e-4)


SHAPE = (5, 16, 24)


def problem(method="tsd+keep"):
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    spec = small_spec(method, shape=SHAPE, layout=layout, rank=3, directions=4)
    kernel = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    return spec, kernel, trained(0, spec)[0]


@pytest.mark.parametrize("where", ["devices", "hosts"])
@pytest.mark.parametrize(
    "spec", [P(None, "fsdp"), P(None, "fsdp", "tensor"), P()], ids=str
)
def test_a_launch_does_not_depend_on_where_it_runs(spec, where):
    adapters_spec, kernel, trainable = problem()
    want = launch({"k": jnp.asarray(kernel)}, trainable, adapters_spec)
    mesh = make_mesh(MESH)
    sharded = {"k": jax.device_put(kernel, NamedSharding(mesh, spec))}
    extraction = Extraction(where=where, memory_budget=1)
    got = launch(sharded, trainable, adapters_spec, extraction=extraction)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("optimized")
def test_hosts_leave_nothing_to_decompose_to_the_devices():
    """What is compiled for the devices spreads matrices; it solves nothing."""
    spec, kernel, trainable = problem()
    sharding = NamedSharding(make_mesh(MESH), P(None, "fsdp", "tensor"))
    kernel = jax.device_put(kernel, sharding)
    chunks = plan_chunks(kernel, spec.kernels[0].layout, memory_budget=1)
    adapter = trainable.adapters["k"]
    noise = np.zeros((5, 16), np.float32)
    arrays = (kernel, adapter.a, adapter.b, None, noise, None, np.int32(0))
    text = _spread_chunk.lower(*arrays, chunks=chunks).compile().as_text() or ""
    assert "custom-call" not in text
    assert "f64" not in text


def test_progress_is_told_chunk_by_chunk():
    spec, kernel, trainable = problem()
    seen = []
    launch(
        {"k": jnp.asarray(kernel)},
        trainable,
        spec,
        extraction=Extraction(memory_budget=16 * 24 * 4 * 2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_one_program_serves_all_kernels_of_a_shape():
    spec, kernel, trainable = problem("dash")
    program: Any = _launch_chunk
    before = program._cache_size()
    for seed in range(2):
        value = jnp.asarray(kernel + seed)
        launch({"k": value}, trainable, spec, extraction=Extraction(memory_budget=1))
    assert program._cache_size() == before + 1


def test_joining_again_compiles_nothing():
    layout, values, kernel = place(CASES["fsdp"])
    chunks = plan_chunks(kernel, layout, memory_budget=1)
    parts = [np.ones((8, 3), np.float32)] * len(chunks.starts)
    whole = NamedSharding(make_mesh(MESH), P())
    for places in (None, whole):
        chunks.join(parts, places)
        programs = chunks.joiner(places)._cache_size()
        again = plan_chunks(
            kernel, layout, memory_budget=1
        )  # as the next launch cuts it
        assert again.joiner(places) is chunks.joiner(places)
        assert again.join(parts, places).shape == (len(values), 3)
        assert again.joiner(places)._cache_size() == programs


def test_platforms():
    assert has_float64("cpu")
    assert has_float64("gpu")
    for platform in ("tpu", "METAL", "neuron"):
        assert not has_float64(platform)


def test_hosts_need_a_cpu(monkeypatch):
    def refuse(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", refuse)
    with pytest.raises(InputError, match=r"JAX_PLATFORMS='cpu' leaves out: add ',cpu'"):
        host_device()


def test_errors():
    with pytest.raises(InputError, match=r"'moon'.*'auto', 'devices' or 'hosts'"):
        Extraction(where="moon")
    with pytest.raises(InputError, match=r"solver 'qr'.*'dense' or 'tridiagonal'"):
        Extraction(solver="qr")
