from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tsd_jax.huggingface import device_loader
from tsd_jax.huggingface.device_loader import DeviceLoader, read_ahead


def mesh() -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def bring(array: np.ndarray, depth: int, sharding: Any, encode: Any = None):
    """Place an array through `DeviceLoader`; give it and the blocks it took."""
    way = DeviceLoader(array.shape, array.dtype, depth, sharding, encode)
    blocks = []
    for step in way.steps:
        parts = [np.array(array[index]) for index in way.indices(step)]
        assert sum(part.nbytes for part in parts) == way.bytes
        blocks += parts
        way.put(step, parts)
    return way.finish(), blocks


@pytest.fixture
def filling(monkeypatch):
    """Let every stack fill matrix by matrix, however small."""
    monkeypatch.setattr(device_loader, "AT_ONCE", 0)


STACK = np.arange(4 * 2 * 4 * 6, dtype=np.float32).reshape(4, 2, 4, 6)


@pytest.mark.usefixtures("filling")
@pytest.mark.parametrize(
    ("depth", "spec", "blocks"),
    [
        (1, P(), 4),  # eight devices hold the same: it is read once
        (1, P(None, None, "x"), 4 * 4),
        (2, P(None, None, ("x", "y")), None),
        (2, P(None, None, "x", "y"), 8 * 8),
        (2, P("x", "y"), 8),  # the stack itself is cut: each device has one matrix
        (2, P("y", None, None, None), 2 * 4),
    ],
)
def test_a_stack_fills_where_it_lies(depth, spec, blocks):
    if blocks is None:
        array, blocks = np.concatenate([STACK] * 2, 2), 8 * 8
    else:
        array = STACK
    place = NamedSharding(mesh(), spec)
    found, taken = bring(array, depth, place)
    assert found.sharding == place
    np.testing.assert_array_equal(found, array)
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, array[shard.index])
    assert len(taken) == blocks
    assert {part.shape[:depth] for part in taken} == {(1,) * depth}


@pytest.mark.usefixtures("filling")
def test_one_device_fills_too_and_its_array_is_free_to_move():
    found, taken = bring(STACK, 2, None)
    np.testing.assert_array_equal(found, STACK)
    assert not found.committed
    assert [part.shape for part in taken] == [(1, 1, 4, 6)] * 8


def test_what_is_small_comes_at_once():
    place = NamedSharding(mesh(), P(None, None, "x"))
    found, taken = bring(STACK, 2, place)
    np.testing.assert_array_equal(found, STACK)
    assert [part.shape for part in taken] == [(4, 2, 1, 6)] * 4


def halved(matrices: jax.Array) -> dict[str, jax.Array]:
    return {"half": matrices / 2, "sum": matrices.sum(-2, keepdims=True)}


@pytest.mark.usefixtures("filling")
@pytest.mark.parametrize("place", [None, P("x"), P(None, None, None, "y")])
def test_matrices_are_encoded_on_the_way(place):
    where = None if place is None else NamedSharding(mesh(), place)
    found, _ = bring(STACK, 2, where, halved)
    np.testing.assert_array_equal(found["half"], STACK / 2)
    np.testing.assert_array_equal(found["sum"], STACK.sum(-2, keepdims=True))
    if where is not None:
        assert found["half"].sharding == found["sum"].sharding == where


@pytest.mark.usefixtures("optimized")
def test_a_stack_is_filled_in_place(monkeypatch):
    monkeypatch.setattr(device_loader, "AT_ONCE", 0)
    whole = jnp.zeros((4, 8, 8))
    lowered = device_loader._fill.lower(
        whole, whole[:1], (np.int32(0),), encode=None, mesh=None
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == whole.nbytes


def test_reading_ahead_keeps_order_and_its_budget():
    lock, now, most = threading.Lock(), [0], [0]

    def run(size: int) -> int:
        with lock:
            now[0] += size
            most[0] = max(most[0], now[0])
        return size

    sizes = [3, 4, 2, 12, 1, 1, 9, 5, 5, 1]
    jobs = [(n, size, lambda size=size: run(size)) for n, size in enumerate(sizes)]
    seen = []
    for number, size in read_ahead(iter(jobs), readers=3, ahead=10):
        seen.append((number, size))
        with lock:
            now[0] -= size
    assert seen == list(enumerate(sizes))
    assert most[0] <= 12  # the largest alone, and 10 otherwise
    assert most[0] >= 9


def test_a_fault_of_a_reader_arrives_and_the_rest_is_not_run():
    ran = []

    def run(number: int) -> int:
        ran.append(number)
        if number == 1:
            raise ValueError("lost")
        return number

    jobs = [(n, 1, lambda n=n: run(n)) for n in range(50)]
    with pytest.raises(ValueError, match="lost"):
        list(read_ahead(jobs, readers=2, ahead=4))
    assert len(ran) < 10
