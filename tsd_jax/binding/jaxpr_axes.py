"""Follow the axes of arrays through a traced program, to where they are used.

A transform that hands a stack's layers to a function one by one takes an axis away.
Which one is written in the program: `scan` takes the first, after the transpositions
before it, and the batching rule of `mark` is told where `vmap` put it. Indexing is
followed as well, and what cannot be followed is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
from jax.interpreters import ad, batching

Found = Callable[[int, "Origin | None"], None]

_mark = jex.Primitive("tsd_mark")
_mark.multiple_results = True


@_mark.def_abstract_eval
def _no_results(x: Any, **params: Any) -> list:
    del x, params
    return []


def _batched(args: Sequence, dims: Sequence[int], *, note: int, lifted: tuple):
    (x,), (dim,) = args, dims
    moved = (axis + (axis >= dim) for axis in lifted)
    return _mark.bind(x, note=note, lifted=(dim, *moved)), []


def _differentiated(primals: Sequence, tangents: Sequence, **params: Any):
    del tangents
    return _mark.bind(*primals, **params), []


batching.primitive_batchers[_mark] = _batched
ad.primitive_jvps[_mark] = _differentiated


def mark(x: jax.Array, note: int) -> None:
    """Leave a mark with a number on an array, for `follow` to find."""
    _mark.bind(x, note=note, lifted=())


class Origin(NamedTuple):
    """Say where an array of a program comes from.

    Attributes:
      source: number of the program's input. axes: its axis behind each of the array's.
      shape: of the array.
    """

    source: int
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def take(self, kept: Sequence[int], shape: Sequence[int]) -> Origin:
        """Keep these axes, in this order."""
        return self._replace(
            axes=tuple(self.axes[axis] for axis in kept), shape=tuple(shape)
        )

    def without(self, axes: Sequence[int]) -> Origin:
        """Take axes away."""
        kept = [axis for axis in range(len(self.axes)) if axis not in axes]
        return self.take(kept, [self.shape[axis] for axis in kept])


Origins = list[Origin | None]


def follow(jaxpr: jex.Jaxpr, origins: Origins, found: Found) -> Origins:
    """Find the marks in a program on arrays that come from its inputs.

    Args:
      jaxpr: the program, of `jax.make_jaxpr`.
      origins: of its inputs, None for those of no interest.
      found: called with the number of each mark, and the origin of the array it lies
        on; None where it cannot be told.

    Returns:
      The origins of the program's outputs.
    """
    known = {v: o for v, o in zip(jaxpr.invars, origins, strict=True) if o}

    def of(atoms: Sequence) -> Origins:
        return [known.get(a) if isinstance(a, jex.Var) else None for a in atoms]

    for equation in jaxpr.eqns:
        inputs = of(equation.invars)
        if equation.primitive is _mark:
            (origin,) = inputs
            lifted = equation.params["lifted"]
            found(equation.params["note"], origin and origin.without(lifted))
            continue
        rule = _RULES.get(equation.primitive.name, _enter)
        outputs = rule(equation, inputs, found)
        known |= {v: o for v, o in zip(equation.outvars, outputs, strict=False) if o}
    return of(jaxpr.outvars)


def _shape(equation: Any) -> tuple[int, ...]:
    return tuple(equation.outvars[0].aval.shape)


def _keep(equation: Any, inputs: Origins, found: Found) -> Origins:
    """Keep the axes of what neither moves nor mixes them, slices among them."""
    del found
    shape, first = _shape(equation), inputs[0]
    return [first and first.take(range(len(shape)), shape)]


def _transpose(equation: Any, inputs: Origins, found: Found) -> Origins:
    del found
    order, (x,) = equation.params["permutation"], inputs
    return [x and x.take(order, _shape(equation))]


def _squeeze(equation: Any, inputs: Origins, found: Found) -> Origins:
    del found
    (x,) = inputs
    return [x and x.without(equation.params["dimensions"])]


def _scan(equation: Any, inputs: Origins, found: Found) -> Origins:
    """Enter a scan's body; what comes out stacked has the axis again."""
    body = equation.params["jaxpr"].jaxpr
    outside = _unstacked(equation.invars, body.invars)
    carried = _unstacked(equation.outvars, body.outvars)
    stacked = [x for x in inputs[outside:] if x]
    inner = [x and x.without([0]) for x in inputs[outside:]]
    outputs = follow(body, [*inputs[:outside], *inner], found)
    first = {x.source: (x.axes[0], x.shape[0]) for x in stacked}

    def restack(y: Origin | None) -> Origin | None:
        if y is None or y.source not in first:
            return None
        axis, size = first[y.source]
        return Origin(y.source, (axis, *y.axes), (size, *y.shape))

    return [*outputs[:carried], *map(restack, outputs[carried:])]


def _unstacked(around: Sequence[Any], within: Sequence[Any]) -> int:
    """Count the arrays that a scan passes on whole; they come before the stacked ones.

    JAX's own counts have other names from version to version.
    """
    pairs = zip(around, within, strict=True)
    return sum(outer.aval.ndim == inner.aval.ndim for outer, inner in pairs)


def _while(equation: Any, inputs: Origins, found: Found) -> Origins:
    tested = equation.params["cond_nconsts"]
    own = tested + equation.params["body_nconsts"]
    follow(
        equation.params["cond_jaxpr"].jaxpr, [*inputs[:tested], *inputs[own:]], found
    )
    return follow(equation.params["body_jaxpr"].jaxpr, inputs[tested:], found)


def _cond(equation: Any, inputs: Origins, found: Found) -> Origins:
    outputs = [
        follow(branch.jaxpr, inputs[1:], found)
        for branch in equation.params["branches"]
    ]
    return [y[0] if len(set(y)) == 1 else None for y in zip(*outputs, strict=True)]


def _enter(equation: Any, inputs: Origins, found: Found) -> Origins:
    """Enter what calls a program with its own inputs: jit, remat, custom rules."""
    for value in equation.params.values():
        inner = value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
        if isinstance(inner, jex.Jaxpr) and len(inner.invars) == len(inputs):
            return follow(inner, inputs, found)
    return []


_RULES: dict[str, Callable[[Any, Origins, Found], Origins]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "dynamic_slice",
            "name",
            "reduce_precision",
            "sharding_constraint",
            "slice",
        ),
        _keep,
    ),
    "optimization_barrier": lambda equation, inputs, found: inputs,
}
