from __future__ import annotations

import itertools

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout

LAYOUTS = {
    "dense": (Layout(), (3, 5)),
    "scanned": (Layout((0,), (1,), (2,)), (2, 3, 5)),
    "scanned on axis 1": (Layout((1,), (0,), (2,)), (3, 2, 5)),
    "scanned on the last axis": (Layout((2,), (0,), (1,)), (3, 5, 2)),
    "heads out": (Layout((), (0,), (1, 2)), (3, 2, 5)),
    "heads in": (Layout((), (0, 1), (2,)), (2, 3, 5)),
    "mixed order": (Layout((1, 3), (2,), (4, 0)), (2, 3, 4, 5, 6)),
    "inputs reversed": (Layout((), (1, 0), (2,)), (2, 3, 4)),
}
layouts = pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS)


@layouts
def test_matrices_hold_every_entry_at_its_place(layout, shape):
    """Against index arithmetic written out, one entry after the other."""
    kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrices = np.asarray(layout.to_matrices(kernel))
    assert matrices.shape == layout.shape(shape)
    sizes = [[shape[a] for a in g] for g in (layout.inputs, layout.outputs)]
    for index in itertools.product(*map(range, shape)):
        batch = tuple(index[axis] for axis in layout.batch)
        row, column = (
            int(np.ravel_multi_index([index[axis] for axis in group], size))
            for group, size in zip((layout.inputs, layout.outputs), sizes, strict=True)
        )
        assert matrices[(*batch, row, column)] == kernel[index]


@layouts
def test_storing_again_is_the_inverse(layout, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    again = layout.from_matrices(layout.to_matrices(kernel), shape)
    np.testing.assert_array_equal(again, kernel)


@pytest.mark.parametrize(
    ("layout", "ndim"),
    [
        (Layout(), 3),
        (Layout((0,), (1,), (1,)), 3),
        (Layout((), (0,), (2,)), 3),
        (Layout((), (0, 1), ()), 2),
        (Layout((0,), (), (1,)), 2),
        (Layout((1, 0), (2,), (3,)), 4),
        (Layout((0,), (1,), (2,), lifted=(1,)), 3),
        (Layout((-1,), (0,), (1,)), 3),
    ],
)
def test_impossible_layouts_are_refused_by_path(layout, ndim):
    with pytest.raises(InputError, match=r"attention/kernel: Layout.*name each axis"):
        layout.validate("attention/kernel", ndim)


def test_possible_layouts_pass():
    for layout, shape in LAYOUTS.values():
        layout.validate("kernel", len(shape))


@pytest.mark.parametrize(
    ("batch", "lifted", "visible"),
    [
        ((), (), ()),
        ((0,), (0,), ()),
        ((0, 1), (0,), (0,)),
        ((0, 3), (0,), (2,)),
        ((0, 3), (3,), (0,)),
        ((0, 1, 2), (0, 1), (0,)),
    ],
)
def test_visible_batch_counts_as_the_module_does(batch, lifted, visible):
    rest = [axis for axis in range(5) if axis not in batch]
    layout = Layout(batch, tuple(rest[:1]), tuple(rest[1:]), lifted)
    layout.validate("kernel", 5)
    assert layout.visible_batch == visible
