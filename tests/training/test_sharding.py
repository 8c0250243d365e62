from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.trees import method_of, small_spec, trained
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule, kernel_spec
from tsd_jax.extraction.launch import launch
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.sharding import (
    adapter_shardings,
    check_batch,
    constrain,
    make_mesh,
    param_shardings,
    place_batch,
    state_shardings,
)
from tsd_jax.training.state import create_state

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((2, 2, 2))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((8, 1, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
    ],
)
def test_meshes(shape, sizes):
    mesh = make_mesh(shape)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.devices.flatten().tolist() == jax.devices()


def test_a_mesh_of_some_devices():
    mesh = make_mesh((1, -1, 1), jax.devices()[:3])
    assert mesh.devices.shape == (1, 3, 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2), "must be three sizes.*at most one of them -1"),
        ((2, 2, 2, 1), "must be three sizes"),
        ((-1, -1, 1), "must be three sizes"),
        ((0, 8, 1), "must be three sizes"),
        ((-2, 4, 1), "must be three sizes"),
        ((3, 1, 1), "needs 3 devices, but there are 8"),
        ((16, 1, 1), "needs 16 devices, but there are 8"),
        ((-1, 3, 1), "needs 6 devices, but there are 8"),
        ((-1, 16, 1), "needs 16 devices, but there are 8"),
    ],
)
def test_impossible_meshes_are_refused(shape, message):
    with pytest.raises(InputError, match=message):
        make_mesh(shape)


RULES = (
    (r"embed/.*", P("tensor", "fsdp")),
    (r"layers/.*/kernel", P(None, "fsdp", "tensor")),
    (r"layers/odd/.*", P("data")),
    (r".*", P()),
)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def test_the_first_rule_that_matches_in_full_wins(mesh):
    params = {
        "embed": {"embedding": shape(8, 4)},
        "layers": {
            "q": {"kernel": shape(3, 4, 6), "kernel_scale": shape(3, 4, 6)},
            "odd": {"kernel": shape(3, 5, 6)},
        },
        "norm": {"scale": shape(4)},
    }
    got = param_shardings(params, RULES, mesh)
    assert got == {
        "embed": {"embedding": NamedSharding(mesh, P("tensor", "fsdp"))},
        "layers": {
            "q": {
                "kernel": NamedSharding(mesh, P(None, "fsdp", "tensor")),
                "kernel_scale": NamedSharding(mesh, P(None, None, None)),
            },
            # 5 rows do not divide over two devices: whole, but columns still split.
            "odd": {"kernel": NamedSharding(mesh, P(None, None, "tensor"))},
        },
        "norm": {"scale": NamedSharding(mesh, P(None))},
    }


def test_axes_over_two_mesh_axes_must_divide_by_both(mesh):
    rules = ((".*", P(("data", "fsdp"), "tensor")),)
    got = param_shardings({"a": shape(8, 2), "b": shape(6, 2)}, rules, mesh)
    assert got["a"].spec == P(("data", "fsdp"), "tensor")
    assert got["b"].spec == P(None, "tensor")


def test_a_path_without_a_rule_is_refused(mesh):
    with pytest.raises(InputError, match=r"matches norm/scale; end them with"):
        param_shardings({"norm": {"scale": shape(4)}}, RULES[:3], mesh)


ADAPTERS = {
    # layout, kernel's shape, its spec -> A (rows), B (columns), batch
    "dense": (Layout(), (4, 6), P("fsdp", "tensor"), "fsdp", "tensor", ()),
    "row parallel": (Layout(), (4, 6), P("tensor", "fsdp"), "tensor", "fsdp", ()),
    "replicated": (Layout(), (4, 6), P(), None, None, ()),
    "stack": (
        Layout((0,), (1,), (2,), (0,)),
        (3, 4, 6),
        P(None, "fsdp", "tensor"),
        "fsdp",
        "tensor",
        (None,),
    ),
    "split stack": (
        Layout((2,), (0,), (1,), (2,)),
        (4, 6, 2),
        P("tensor", None, "fsdp"),
        "tensor",
        None,
        ("fsdp",),
    ),
    "heads out, split by head": (
        Layout((), (0,), (1, 2)),
        (4, 2, 3),
        P("fsdp", "tensor"),
        "fsdp",
        "tensor",
        (),
    ),
    "heads in, split within the head": (
        Layout((), (0, 1), (2,)),
        (2, 4, 6),
        P(None, "tensor", "fsdp"),
        None,
        "fsdp",
        (),
    ),
    "heads in, split both ways": (
        Layout((), (0, 1), (2,)),
        (2, 4, 6),
        P("fsdp", "tensor"),
        None,
        None,
        (),
    ),
    "a kernel axis over two": (
        Layout(),
        (4, 6),
        P(("data", "fsdp"), None),
        ("data", "fsdp"),
        None,
        (),
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("method", ["lora", "dash", "init", "tsd+keep"])
def test_adapters_lie_as_their_kernel_does(mesh, case, method):
    layout, sizes, spec, rows, columns, batch = ADAPTERS[case]
    rule = Rule(pattern="k", rank=2, directions=2, dora=method == "dash")
    kernel = kernel_spec("k", sizes, layout, rule, method_of(method))
    adapter, frozen = adapter_shardings(kernel, NamedSharding(mesh, spec))
    assert adapter.kernel == kernel
    assert adapter.a == NamedSharding(mesh, P(*batch, rows, None))
    assert adapter.b == NamedSharding(mesh, P(*batch, None, columns))
    assert (adapter.magnitude is None) == (method != "dash")
    if adapter.magnitude is not None:
        assert adapter.magnitude == NamedSharding(mesh, P(*batch, columns))
    assert (adapter.gain is None) == (method in ("lora", "init"))
    if adapter.gain is not None:
        assert adapter.gain == NamedSharding(mesh, P(*batch, None))
    if method == "lora":
        assert jax.tree.leaves(frozen) == []
    else:
        assert frozen.left == NamedSharding(mesh, P(*batch, rows, None))
        assert frozen.right == NamedSharding(mesh, P(*batch, columns, None))
        assert frozen.offset == NamedSharding(mesh, P(*batch, None))


@pytest.mark.parametrize("method", ["lora", "tsd"])
def test_moments_lie_beside_what_they_are_of(mesh, method):
    spec = small_spec(method, shape=(4, 6))
    optimizer = optax.chain(make_optimizer(1e-3, 1e-3, clip_norm=1.0), optax.ema(0.9))
    state = jax.eval_shape(lambda: create_state(jax.random.key(0), spec, optimizer))
    kernel = NamedSharding(mesh, P("fsdp", "tensor"))
    got = state_shardings(state, spec, {"k": kernel}, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    by_shape = {
        (4, 2): P("fsdp", None),
        (2, 6): P(None, "tensor"),
        (4,): P(None),
        (): P(),
    }
    pairs = zip(
        jax.tree.leaves((got.trainable, got.opt_state)),
        jax.tree.leaves((state.trainable, state.opt_state)),
        strict=True,
    )
    count = 0
    for sharding, leaf in pairs:
        assert sharding == NamedSharding(mesh, by_shape[leaf.shape])
        count += leaf.ndim > 0
    # Adam's two moments, the average, and the adapter itself.
    assert count == 4 * (2 if method == "lora" else 3)
    assert got.step == got.launched == NamedSharding(mesh, P())


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [((4, 6), P("fsdp", "tensor")), ((4, 4, 6), P("fsdp", None, "tensor"))],
)
def test_launch_gives_its_results_the_shardings_of_the_adapter(mesh, sizes, axes):
    """Called by itself, nothing pinned, and beside a kernel that is replicated."""
    layout = Layout((0,), (1,), (2,), (0,)) if len(sizes) == 3 else Layout()
    spec = small_spec("tsd", shape=sizes, layout=layout)
    kernel = np.random.default_rng(0).normal(size=sizes).astype(np.float32)
    want = adapter_shardings(spec.kernels[0], NamedSharding(mesh, axes))
    trainable, directions = trained(0, spec)
    put = jax.device_put((trainable.adapters["k"], directions["k"]), want)
    whole = jax.device_put(kernel, NamedSharding(mesh, P()))
    got = launch({"k": whole}, Trainable(adapters={"k": put[0]}), spec)
    for leaf, sharding in zip(
        jax.tree.leaves((got[0].adapters["k"], got[1]["k"])),
        jax.tree.leaves(want),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_batches_must_divide(mesh):
    check_batch(8, mesh)
    with pytest.raises(InputError, match=r"micro-batch of 6.*= 4 ways; use a multiple"):
        check_batch(6, mesh)


def test_batches_are_split_by_example(mesh):
    tokens = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    placed = place_batch({"tokens": tokens}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2, 3)}
    assert len({str(shard.index) for shard in placed.addressable_shards}) == 4


def test_arrays_of_a_program_are_constrained_by_rules():
    mesh = make_mesh((2, 1, 4))
    rules = ((r"a/b", PartitionSpec("data", "tensor")), (r".*", PartitionSpec()))
    tree = {"a": {"b": np.ones((4, 8))}, "c": np.ones((2,))}
    made = jax.jit(lambda tree: constrain(tree, rules, mesh))(tree)
    assert made["a"]["b"].sharding.spec == PartitionSpec("data", "tensor")
    assert made["c"].sharding.is_fully_replicated
