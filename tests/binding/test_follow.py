from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tsd_jax.binding.follow import follow, primitives
from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import ENTER, Recorder, Region
from tsd_jax.binding.values import Param, identity

CUBE = (4, 4, 4)


def probe(x: Any, number: int) -> None:
    """Enter a region whose module owns what the program makes of a parameter."""
    ENTER.bind(x, region=number, count=0, lifted=((),))


def walk(function: Any, *shapes: tuple[int, ...]) -> Ledger:
    """Follow all inputs of a function, which are candidates."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program: Any = jax.make_jaxpr(function)(*arrays).jaxpr
    recorder = Recorder()
    recorder.regions += [Region("method", "module", (), (0,))] * 8
    ledger = Ledger(recorder, range(len(shapes)))
    follow(program, [Param(n, identity("k", s)) for n, s in enumerate(shapes)], ledger)
    return ledger


def marks(function: Any, *shapes: tuple[int, ...]) -> list[tuple[int, Any]]:
    """Return (number, (input, the axes that are seen)) of all probes of a function."""
    found = []
    for visit in walk(function, *shapes).visits:
        value, lifted = visit.owned[0]
        seen = None
        if isinstance(value, Param):
            dims = [dim for n, dim in enumerate(value.dims) if n not in lifted]
            seen = (value.source, tuple(a.axis for dim in dims for a in dim))
        found.append((visit.region, seen))
    return found


def scan_over(axis: int, body: Any) -> Any:
    """Scan over any axis, in the way libraries do: move it to the front."""

    def function(k):
        step = lambda carry, k: (carry, body(k))  # noqa: E731
        return jax.lax.scan(step, 0.0, jnp.moveaxis(k, axis, 0))[1]

    return function


def plain(k):
    probe(k, 7)
    return k


def looped(k):
    def body(n, x):
        probe(k[n], 7)
        return x + k[n].sum()

    return jax.lax.fori_loop(0, 4, body, 0.0)


def while_looped(k):
    return jax.lax.while_loop(lambda x: (probe(k, 7), x < 4)[1], lambda x: x + 1, 0)


def branched(k):
    return jax.lax.cond(k.sum() > 0, plain, lambda k: k, k)


def restacked(k):
    """What a scan gives out of what it took has the axis again, in front."""
    return plain(scan_over(1, lambda k: k.T)(k))


@jax.custom_vjp
def custom(k):
    return plain(k)


custom.defvjp(lambda k: (custom(k), None), lambda _, g: (g,))


def differentiated(k):
    return jax.value_and_grad(lambda x: (plain(k) @ x).sum())(jnp.ones(4))


WAYS = {
    "as it is": (plain, (0, 1, 2)),
    "transposed": (lambda k: plain(k.T), (2, 1, 0)),
    "one taken": (lambda k: plain(k[:, 1]), (0, 2)),
    "last taken": (lambda k: plain(k[..., -1]), (0, 1)),
    "taken by number": (looped, (1, 2)),
    "scanned": (scan_over(0, plain), (1, 2)),
    "scanned on 1": (scan_over(1, plain), (0, 2)),
    "scanned twice": (scan_over(2, scan_over(0, plain)), (1,)),
    "scanned and restacked": (restacked, (1, 2, 0)),
    "vmapped": (jax.vmap(plain), (1, 2)),
    "vmapped on 1": (jax.vmap(plain, in_axes=1), (0, 2)),
    "vmapped on 2, then 0": (jax.vmap(jax.vmap(plain), in_axes=2), (1,)),
    "vmapped on 0, then 1": (jax.vmap(jax.vmap(plain, in_axes=1)), (1,)),
    "vmapped on 1, scanned on 1": (jax.vmap(scan_over(1, plain), in_axes=1), (0,)),
    "scanned on 1, vmapped on 1": (scan_over(1, jax.vmap(plain, in_axes=1)), (0,)),
    "jitted": (jax.jit(lambda k: plain(jnp.swapaxes(k, 0, 1))), (1, 0, 2)),
    "remat": (jax.checkpoint(plain), (0, 1, 2)),
    "in a test": (while_looped, (0, 1, 2)),
    "in a branch": (branched, (0, 1, 2)),
    "custom rule": (custom, (0, 1, 2)),
    "beside a gradient": (differentiated, (0, 1, 2)),
    "cast": (lambda k: plain(k.astype(jnp.bfloat16)), (0, 1, 2)),
}


@pytest.mark.parametrize(("function", "axes"), WAYS.values(), ids=WAYS)
def test_axes_of_a_cube_are_followed(function, axes):
    assert marks(function, CUBE) == [(7, (0, axes))]


def test_several_inputs_are_told_apart():
    def both(a, b):
        probe(b.T, 1)
        probe(a, 2)

    assert marks(both, (4, 4), (4, 4)) == [(1, (1, (1, 0))), (2, (0, (0, 1)))]


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda k: k.reshape(2, 2, 4, 4), "has its axes changed by a reshape"),
        (lambda k: k + 1, "is added"),
        (lambda k: k[jnp.array([0, 1])], "is read by index"),
        (lambda k: k[:2], "is cut"),
        (
            lambda k: jax.lax.cond(k[0, 0, 0] > 0, lambda k: k, lambda k: k.T, k),
            "goes through gt",
        ),
        (lambda k: scan_over(0, lambda row: row * 2)(k), "is multiplied"),
        (
            lambda k: jax.lax.fori_loop(0, 3, lambda _, k: k.T, k),
            "is carried and changed by a loop",
        ),
    ],
)
def test_what_cannot_be_followed_is_lost_and_noted(change, how):
    def function(k):
        return plain(change(k))

    assert marks(function, CUBE) == [(7, None)]
    assert walk(function, CUBE).uses[0][0].startswith(how)


def test_what_nothing_comes_of_is_no_use():
    assert walk(lambda k: (k * 2, 1)[1], CUBE).uses == {}


def test_an_array_that_is_carried_unchanged_is_followed():
    def function(k):
        def body(n, carried):
            x, k = carried
            probe(k, 7)
            return x + n, jax.checkpoint(lambda k: k)(k)

        return jax.lax.fori_loop(0, 3, body, (0, k))[0]

    assert marks(function, CUBE) == [(7, (0, (0, 1, 2)))]


def test_primitives_are_counted_inside_programs_too():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    program: Any = jax.make_jaxpr(lambda x: jnp.sin(inner(x)))(1.0).jaxpr
    assert primitives(program)["sin"] == 2
