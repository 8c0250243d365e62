from __future__ import annotations

import jax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.trees import small_spec
from tsd_jax.core.adapter import Adapter, Directions, init, leaves_beside
from tsd_jax.core.layout import Layout
from tsd_jax.core.leaves import (
    FACTORS,
    FULL,
    GAINS,
    KernelAxes,
    leaf,
    leaf_shapes,
    leaf_specs,
    map_leaves,
)
from tsd_jax.core.methods import get_method
from tsd_jax.core.types import Leaf
from tsd_jax.extraction.matrix_launch import Ranking

P = PartitionSpec


class Extra(struct.PyTreeNode):
    """A leaf of its own, as somebody might add one."""

    row: Leaf = struct.field(metadata=leaf("out", "rank", group=GAINS))
    note: str = struct.field(pytree_node=False, default="")


def test_what_the_table_says_of_an_adapter():
    specs = leaf_specs(Adapter)
    groups = {name: spec.group for name, spec in specs.items()}
    assert groups == {"a": FACTORS, "b": FACTORS, "gain": GAINS, "magnitude": FACTORS}
    assert {spec.group for spec in leaf_specs(Directions).values()} == {None}
    renewed = {
        name: [n for n, spec in specs.items() if spec.renewed(get_method(name))]
        for name in ("lora", "dash", "init", "tsd")
    }
    assert renewed == {
        "lora": [],
        "dash": ["gain"],
        "init": ["a", "b", "magnitude"],
        "tsd": ["a", "b", "gain", "magnitude"],
    }
    kept = get_method("init", keep=True)
    assert not specs["magnitude"].renewed(kept)
    assert specs["a"].renewed(kept)


def test_what_launch_and_weight_decay_do_to_the_groups():
    found = {
        group.name: (group.decays, *map(group.resets, map(get_method, ("dash", "tsd"))))
        for group in (FACTORS, GAINS, FULL)
    }
    assert found == {
        "lora": (True, False, True),
        "gain": (False, True, True),
        "full": (True, False, False),
    }


@pytest.mark.parametrize("method", ["lora", "dash", "init", "tsd+keep"])
@pytest.mark.parametrize("dora", [False, True])
def test_shapes_are_those_of_a_started_adapter(method, dora):
    spec = small_spec(method, dora=dora)
    params = {k.path: jax.numpy.ones(k.shape) for k in spec.kernels}
    trainable, directions = init(jax.random.key(0), spec, params=params)
    for kernel in spec.kernels:
        pair = trainable.adapters[kernel.path], directions[kernel.path]
        for tree in pair:
            want = {
                name: getattr(tree, name).shape
                for name in leaf_specs(tree)
                if getattr(tree, name) is not None
            }
            assert leaf_shapes(type(tree), kernel) == want


def test_a_leaf_of_ones_own_needs_one_line():
    kernel = small_spec("tsd").kernels[1]
    assert list(leaf_specs(Extra)) == ["row"]
    assert leaf_shapes(Extra, kernel) == {"row": (3, 7, 2)}
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    sharding = NamedSharding(mesh, P(None, "x", "y"))
    axes = KernelAxes.of_kernel(kernel, sharding)
    made = Extra(**map_leaves(Extra, kernel, axes.sharding))
    assert made.row == NamedSharding(mesh, P(None, "y", None))


def test_what_a_kernel_does_not_have_is_none():
    kernel = small_spec("lora", shape=(4, 6), layout=Layout()).kernels[0]
    adapter, directions = leaves_beside(kernel, lambda spec: spec.axes)
    assert (adapter.a, adapter.b) == (("in", "rank"), ("rank", "out"))
    assert adapter.gain is adapter.magnitude is None
    assert set(leaf_shapes(Directions, kernel)) == set()
    assert directions == Directions(None, None, None)
    assert leaf_shapes(Ranking, kernel)["sigma"] == (4,)
