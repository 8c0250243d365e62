from __future__ import annotations

import pytest

from tsd_jax.binding.values import Param, View, identity, multiply, regroup


@pytest.mark.parametrize(
    ("before", "after", "axes"),
    [
        ((2, 3, 4), (6, 4), [(0, 1), (2,)]),
        ((2, 1, 4), (2, 4), [(0, 1), (2,)]),
        ((2, 4), (2, 1, 4), [(0,), (), (1,)]),
        ((1, 1), (1,), [(0, 1)]),
        ((2, 3, 4), (24,), [(0, 1, 2)]),
        ((2, 3, 4), (4, 6), None),
        ((4, 4), (2, 2, 4), None),
    ],
)
def test_reshapes_are_followed_where_axes_stay_whole(before, after, axes):
    got = regroup(identity("k", before), before, after)
    if axes is None:
        assert got is None
    else:
        assert got is not None
        assert [tuple(atom.axis for atom in dim) for dim in got] == axes


def test_merged_axes_come_apart_again():
    merged = regroup(identity("x", (2, 3, 4)), (2, 3, 4), (6, 4))
    assert merged is not None
    assert regroup(merged, (6, 4), (2, 3, 4)) == identity("x", (2, 3, 4))


def test_a_product_lays_batch_before_free_axes():
    view = View(0, 0, identity("x", (5, 2, 3)))
    kernel = Param(0, identity("k", (2, 3, 7)))
    product = multiply(view, kernel, [(2, 1)], [(1, 0)], kernel_first=True)
    assert product is not None
    assert product.contracted == ((2, 1),)
    assert product.batch == ((1, 0),)
    seen = [(atom.of, atom.axis) for dim in product.dims for atom in dim]
    assert seen == [("x", 1), ("k", 2), ("x", 0)]
    assert multiply(view, kernel, [(0, 1)], [], kernel_first=False) is None
