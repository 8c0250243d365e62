from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tests.helpers.models import LIFTS, Net, inputs
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.binding.linen.trace import trace_layouts
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout


def layouts_of(model: nn.Module, *args: Any, mutable: Any = False) -> dict[str, Layout]:
    """Trace all kernels of a model, with shapes alone."""
    args = tuple(jnp.asarray(arg) for arg in args)
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    kernels = [p for p in paths.flatten(variables["params"]) if p.endswith("kernel")]
    layouts, _ = trace_layouts(
        model.apply, variables, tuple(kernels), HANDLERS, args, {"mutable": mutable}
    )
    assert set(layouts) == set(kernels)
    return layouts


def scanned(module: Any, axis: int, **fields: Any) -> nn.Module:
    """Scan four copies of a linear module over its own output."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return module(name="linear", **fields)(x), None

    scan = nn.scan(
        Step, variable_axes={"params": axis}, split_rngs={"params": True}, length=4
    )

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(name="layers")(x, None)

    return Scanned()


CUBES = {
    "heads out": (nn.DenseGeneral((4, 4)), (2, 4), Layout((), (0,), (1, 2))),
    "heads in": (
        nn.DenseGeneral(4, axis=(-2, -1)),
        (2, 4, 4),
        Layout((), (0, 1), (2,)),
    ),
    "stacked": (
        nn.DenseGeneral(4, batch_dims=(0,)),
        (4, 2, 4),
        Layout((0,), (1,), (2,)),
    ),
    "einsum, middle axis in": (
        nn.Einsum((4, 4, 4), "bi,hio->bho"),
        (2, 4),
        Layout((), (1,), (0, 2)),
    ),
    "einsum, middle axis a stack": (
        nn.Einsum((4, 4, 4), "bhi,iho->bho"),
        (2, 4, 4),
        Layout((1,), (0,), (2,)),
    ),
    "scan on axis 0": (
        scanned(nn.Dense, 0, features=4),
        (2, 4),
        Layout((0,), (1,), (2,), lifted=(0,)),
    ),
    "scan on axis 1": (
        scanned(nn.Dense, 1, features=4),
        (2, 4),
        Layout((1,), (0,), (2,), lifted=(1,)),
    ),
    "scan on the last axis": (
        scanned(nn.Dense, -1, features=4),
        (2, 4),
        Layout((2,), (0,), (1,), lifted=(2,)),
    ),
}


@pytest.mark.parametrize(("model", "shape", "want"), CUBES.values(), ids=CUBES)
def test_a_cube_of_4_4_4_is_what_its_module_does_with_it(model, shape, want):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones(shape))
    (kernel,) = (
        leaf
        for path, leaf in paths.flatten(variables["params"]).items()
        if path.endswith("kernel")
    )
    assert kernel.shape == (4, 4, 4)
    (layout,) = layouts_of(model, jnp.ones(shape)).values()
    assert layout == want


# Of the body's kernels: heads (6, 2, 4), each (2, 4, 5), join (2, 5, 6), mix (6, 6).
PLAIN = {
    "heads": Layout((), (0,), (1, 2)),
    "each": Layout((0,), (1,), (2,)),
    "join": Layout((), (0, 1), (2,)),
    "mix": Layout((), (0,), (1,)),
}
FIRST = {
    "heads": Layout((0,), (1,), (2, 3), (0,)),
    "each": Layout((0, 1), (2,), (3,), (0,)),
    "join": Layout((0,), (1, 2), (3,), (0,)),
    "mix": Layout((0,), (1,), (2,), (0,)),
}
SECOND = {
    "heads": Layout((1,), (0,), (2, 3), (1,)),
    "each": Layout((0, 1), (2,), (3,), (1,)),
    "join": Layout((1,), (0, 2), (3,), (1,)),
    "mix": Layout((1,), (0,), (2,), (1,)),
}
LAST = {
    "heads": Layout((3,), (0,), (1, 2), (3,)),
    "each": Layout((0, 3), (1,), (2,), (3,)),
    "join": Layout((3,), (0, 1), (2,), (3,)),
    "mix": Layout((2,), (0,), (1,), (2,)),
}
# The inner scan's axis 1 comes after the outer one's axis 0: stored axis 2.
NESTED = {
    "heads": Layout((0, 2), (1,), (3, 4), (0, 2)),
    "each": Layout((0, 1, 2), (3,), (4,), (0, 2)),
    "join": Layout((0, 2), (1, 3), (4,), (0, 2)),
    "mix": Layout((0, 2), (1,), (3,), (0, 2)),
}
WANTED = {
    "plain": PLAIN,
    "remat": PLAIN,
    "scan": FIRST,
    "scan on axis 1": SECOND,
    "scan on the last axis": LAST,
    "scan of remat": FIRST,
    "remat of scan": FIRST,
    "scan of scans": NESTED,
    "vmap": FIRST,
}


@pytest.mark.parametrize("lift", LIFTS)
def test_layouts_under_lifts(lift):
    layouts = layouts_of(Net(lift), inputs(lift))
    inner = "inner/" if lift == "scan of scans" else ""
    want = {f"body/{inner}{k}/kernel": v for k, v in WANTED[lift].items()}
    assert layouts == {**want, "head/kernel": Layout()}


def test_attention_of_flax_with_a_cache():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    x = jnp.ones((1, 1, 6))
    layouts = layouts_of(model, x, mutable=["cache"])
    heads = dict.fromkeys(("query", "key", "value"), PLAIN["heads"])
    want = {**heads, "out": PLAIN["join"]}
    assert layouts == {f"{name}/kernel": layout for name, layout in want.items()}


class Twice(nn.Module):
    """Contract one kernel over its first axis, then over its second."""

    second: str

    @nn.compact
    def __call__(self, x):
        shared = nn.Einsum((4, 4), use_bias=False, name="shared")
        return shared(shared(x, "bi,io->bo"), self.second)


def test_a_kernel_used_twice_alike_is_fine():
    layouts = layouts_of(Twice("bi,io->bo"), jnp.ones((2, 4)))
    assert layouts == {"shared/kernel": Layout()}


def test_an_ambiguous_kernel_is_refused():
    with pytest.raises(InputError, match=r"shared/kernel is ambiguous.*leave it out"):
        layouts_of(Twice("bo,io->bi"), jnp.ones((2, 4)))


def test_nothing_is_computed_and_owners_are_named():
    model = Net("scan")
    x = jax.ShapeDtypeStruct((2, 3, 6), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    layouts, owners = trace_layouts(
        model.apply, variables, ("head/kernel",), HANDLERS, (x,), {}
    )
    assert layouts == {"head/kernel": Layout()}
    assert owners["head"] == "Dense"
    assert owners["body/each"] == "Einsum"
