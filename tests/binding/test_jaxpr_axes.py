from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tsd_jax.binding.jaxpr_axes import Origin, follow, mark

CUBE = (4, 4, 4)


def marks(function: Any, *shapes: tuple[int, ...]) -> list[tuple[int, Any]]:
    """Return (number, (input, its axes)) of all marks a function leaves."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program: Any = jax.make_jaxpr(function)(*arrays).jaxpr
    found = []
    sources: Any = [Origin(n, tuple(range(len(s))), s) for n, s in enumerate(shapes)]
    follow(program, sources, lambda n, o: found.append((n, o and (o.source, o.axes))))
    return found


def scan_over(axis: int, body: Any) -> Any:
    """Scan over any axis, in the way libraries do: move it to the front."""

    def function(k):
        step = lambda carry, k: (carry, body(k))  # noqa: E731
        return jax.lax.scan(step, 0.0, jnp.moveaxis(k, axis, 0))[1]

    return function


def plain(k):
    mark(k, 7)
    return k


def looped(k):
    def body(n, x):
        mark(k[n], 7)
        return x + k[n].sum()

    return jax.lax.fori_loop(0, 4, body, 0.0)


def while_looped(k):
    return jax.lax.while_loop(lambda x: (mark(k, 7), x < 4)[1], lambda x: x + 1, 0)


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
        mark(b.T, 1)
        mark(a, 2)

    assert marks(both, (4, 4), (4, 4)) == [(1, (1, (1, 0))), (2, (0, (0, 1)))]


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.reshape(2, 2, 4, 4),
        lambda k: k + 1,
        lambda k: k[jnp.array([0, 1])],
        lambda k: jax.lax.cond(k[0, 0, 0] > 0, lambda k: k, lambda k: k.T, k),
        lambda k: scan_over(0, lambda row: row * 2)(k),
    ],
    ids=["reshaped", "computed", "gathered", "either", "computed in a scan"],
)
def test_what_cannot_be_followed_is_lost(change):
    assert marks(lambda k: plain(change(k)), CUBE) == [(7, None)]


def test_a_slice_keeps_axes_and_tells_its_size():
    arrays = jax.ShapeDtypeStruct(CUBE, jnp.float32)
    program: Any = jax.make_jaxpr(lambda k: plain(k[:2, :, 1]))(arrays).jaxpr
    found = []
    follow(program, [Origin(0, (0, 1, 2), CUBE)], lambda n, o: found.append(o))
    assert found == [Origin(0, (0, 1), (2, 4))]
