from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.extraction.test_matrix_launch import launched, problem
from tests.helpers.oracle import core_directions
from tests.helpers.trees import STACKED, small_spec, trained
from tsd_jax.core.adapter import Trainable, delta
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.layout import Layout
from tsd_jax.extraction.chunks import plan_chunks
from tsd_jax.extraction.launch import Operands, _launch_chunk, _spread_chunk, launch
from tsd_jax.extraction.settings import Extraction
from tsd_jax.training.sharding import make_mesh

MESH = (2, 2, 2)
SHAPE = (5, 16, 24)


def random_problem(method="tsd+keep"):
    spec = small_spec(method, shape=SHAPE, layout=STACKED, rank=3, directions=4)
    kernel = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    return spec, kernel, trained(0, spec)[0]


@pytest.mark.parametrize("where", ["devices", "hosts"])
@pytest.mark.parametrize(
    "spec", [P(None, "fsdp"), P(None, "fsdp", "tensor"), P()], ids=str
)
def test_a_launch_does_not_depend_on_where_it_runs(spec, where):
    adapters_spec, kernel, trainable = random_problem()
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
    spec, kernel, trainable = random_problem()
    sharding = NamedSharding(make_mesh(MESH), P(None, "fsdp", "tensor"))
    kernel = jax.device_put(kernel, sharding)
    plan = plan_chunks(kernel, spec.kernels[0].layout, matrices_per_device=1)
    adapter = trainable.adapters["k"]
    noise = np.zeros((5, 16), np.float32)
    trained = {"a": adapter.a, "b": adapter.b, "magnitude": None}
    operands = Operands(kernel, trained, noise, None)
    lowered = _spread_chunk.lower(operands, np.int32(0), plan=plan)
    text = lowered.compile().as_text() or ""
    assert "custom-call" not in text
    assert "f64" not in text


def test_progress_is_told_chunk_by_chunk():
    spec, kernel, trainable = random_problem()
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
    spec, kernel, trainable = random_problem("dash")
    program: Any = _launch_chunk
    before = program._cache_size()
    for seed in range(2):
        value = jnp.asarray(kernel + seed)
        launch({"k": value}, trainable, spec, extraction=Extraction(memory_budget=1))
    assert program._cache_size() == before + 1


def test_dash_leaves_a_and_b_alone():
    spec, _, trainable, new, frozen, _ = launched("dash", (6, 9))
    assert new.adapters["k"].a is trainable.adapters["k"].a
    assert new.adapters["k"].b is trainable.adapters["k"].b
    np.testing.assert_array_equal(frozen["k"].offset, 0)
    before = delta(trainable.adapters["k"], init(jax.random.key(0), spec)[1]["k"])
    np.testing.assert_array_equal(delta(new.adapters["k"], frozen["k"]), before)


def test_axes_of_a_kernel_are_taken_from_its_layout():
    """(out2, layers, in, out1) gives what its matrices give one by one."""
    layout = Layout((1,), (2,), (3, 0), lifted=(1,))
    spec = small_spec("tsd", shape=(2, 3, 6, 4), layout=layout)
    plain = small_spec("tsd", shape=(6, 8))
    kernel = np.random.default_rng(0).normal(size=(2, 3, 6, 4)).astype(np.float32)
    trainable = trained(0, spec)[0]
    new, frozen, report = launch({"k": jnp.asarray(kernel)}, trainable, spec)
    for layer in range(3):
        one = jax.tree.map(lambda x, n=layer: x[n], trainable.adapters["k"])
        matrix = kernel[:, layer].transpose(1, 2, 0).reshape(6, 8)
        single = launch(
            {"k": jnp.asarray(matrix)},
            Trainable(adapters={"k": one.replace(kernel=plain.kernels[0])}),
            plain,
        )
        got = jax.tree.map(
            lambda x, n=layer: x[n], (new.adapters["k"], frozen["k"], report["k"])
        )
        want = (single[0].adapters["k"], single[1]["k"], single[2]["k"])
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_runs_inside_jit_and_leaves_the_settings_alone():
    spec, params, trainable = problem("tsd", (3, 6, 9))
    inside = jax.jit(lambda p, a: launch(p, a, spec))(params, trainable)
    outside = launched("tsd", (3, 6, 9))[3:]
    assert jnp.asarray(0.5).dtype == jnp.float32
    for x, y in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_errors():
    spec, params, trainable = problem("tsd", (6, 9))
    with pytest.raises(InputError, match="no 'k'"):
        launch({"other": params["k"]}, trainable, spec)
    lora = small_spec("lora", shape=(6, 9))
    with pytest.raises(InputError, match="'lora' has no launch"):
        launch(params, trainable, lora)


@pytest.mark.parametrize("where", ["devices", "hosts"])
@pytest.mark.parametrize("method", ["dash", "init", "tsd"])
def test_launch_by_gradients_of_stored_kernels(method, where):
    """(out, layers, in): A and B have no say, and the scale has none."""
    layout = Layout((1,), (2,), (0,), lifted=(1,))
    spec = small_spec(method, shape=(9, 3, 6), layout=layout)
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(9, 3, 6)).astype(np.float32)
    gradient = jnp.asarray(rng.normal(size=(9, 3, 6)), jnp.float32)
    trainable = trained(0, spec)[0]
    params = {"k": jnp.asarray(kernel)}
    extraction = Extraction(where=where)
    new, frozen, report = launch(
        params, trainable, spec, deltas={"k": gradient}, extraction=extraction
    )
    again = launch(params, trainable, spec, deltas={"k": -7.0 * gradient})[2]
    count = spec.kernels[0].ranked
    for layer in range(3):
        want = core_directions(kernel[:, layer].T, np.asarray(gradient)[:, layer].T)
        top = want.order[:count]
        np.testing.assert_array_equal(report["k"].indices[layer], top)
        np.testing.assert_array_equal(again["k"].indices[layer], top)
        np.testing.assert_allclose(report["k"].rates[layer], want.rates, rtol=1e-4)
        ours = np.asarray(frozen["k"].left[layer] @ frozen["k"].right[layer].T)
        np.testing.assert_allclose(ours, want.P[:, top] @ want.Q[:, top].T, atol=1e-5)
    if method == "dash":
        assert new.adapters["k"].a is trainable.adapters["k"].a


def test_methods_that_make_nothing_of_a_gradient():
    spec = small_spec("pissa", shape=(6, 9))
    params = {"k": jnp.ones((6, 9))}
    with pytest.raises(InputError, match="'pissa' ranks by 'largest', which does"):
        launch(params, trained(0, spec)[0], spec, deltas=params)


def test_a_launch_on_nothing_is_refused():
    """As right after the start; directions could only be the first ones."""
    spec, params, _ = problem("tsd", (6, 9))
    trainable, _ = init(jax.random.key(0), spec)
    with pytest.raises(InputError, match=r"cannot launch k: its B is zero.*launch lat"):
        launch(params, trainable, spec)
    zero = {"k": jnp.zeros((6, 9))}
    with pytest.raises(InputError, match="all its change rates are 0; pass a delta"):
        launch(params, trainable, spec, deltas=zero)
    launch(params, trainable, small_spec("pissa", shape=(6, 9)))


def test_a_second_launch_is_refused():
    spec, params, _, new, *_ = launched("dash", (6, 9))
    moved = new.adapters["k"].replace(gain=jnp.full(4, 1e-3))
    with pytest.raises(InputError, match="gains are not zero, so it has launched"):
        launch(params, Trainable(adapters={"k": moved}), spec)
