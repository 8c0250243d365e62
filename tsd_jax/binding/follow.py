"""Follow parameters through a traced program, to everything that uses them.

A transform that hands a stack's layers to a function one by one takes an axis away.
Which one is written in the program: `scan` takes the first, after the transposes
before it, and marks are told where `vmap` put it. Indexing is followed as well. What
cannot be followed is noted as a use of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex

from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import CLAIM, ENTER, LEAVE
from tsd_jax.binding.values import (
    Change,
    Dims,
    Input,
    Param,
    Product,
    Sum,
    Value,
    multiply,
    regroup,
)

Rule = Callable[[Any, list[Value], Ledger], list[Value]]


def follow(jaxpr: jex.Jaxpr, values: Sequence[Value], ledger: Ledger) -> list[Value]:
    """Walk through a program and note what happens to the values of its inputs.

    Args:
      jaxpr: the program, of `jax.make_jaxpr`.
      values: of its inputs, None for those of no interest.
      ledger: takes the notes.

    Returns:
      The values of the program's outputs.
    """
    known = {v: value for v, value in zip(jaxpr.invars, values, strict=True) if value}
    alive = _alive(jaxpr)

    def of(atoms: Sequence) -> list[Value]:
        return [known.get(a) if isinstance(a, jex.Var) else None for a in atoms]

    for number, equation in enumerate(jaxpr.eqns):
        inputs = of(equation.invars)
        if number not in alive or not (any(inputs) or _kept(equation)):
            continue
        mark = _MARKS.get(equation.primitive)
        if mark:
            outputs = mark(ledger, equation, inputs)
        else:
            rule = _RULES.get(equation.primitive.name, _other)
            outputs = rule(equation, inputs, ledger)
        found = zip(equation.outvars, outputs, strict=True)
        known |= {v: value for v, value in found if value}
    return of(jaxpr.outvars)


def _alive(jaxpr: jex.Jaxpr) -> set[int]:
    """Return the numbers of the equations whose results are used."""
    wanted = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}
    alive = set()
    for number, equation in reversed(list(enumerate(jaxpr.eqns))):
        used = any(v in wanted for v in equation.outvars)
        if used or equation.effects or _kept(equation):
            alive.add(number)
            wanted |= {v for v in equation.invars if isinstance(v, jex.Var)}
    return alive


def _kept(equation: Any) -> bool:
    """Return whether an equation is a mark, or may hold some."""
    return equation.primitive in _MARKS or bool(_programs(equation))


def _programs(equation: Any) -> list[jex.Jaxpr]:
    """Return the programs inside an equation."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = each.jaxpr if isinstance(each, jex.ClosedJaxpr) else each
            if isinstance(inner, jex.Jaxpr):
                found.append(inner)
    return found


def _lose(
    equation: Any, inputs: Sequence[Value], ledger: Ledger, why: str = ""
) -> list[Value]:
    """Note that an equation uses its inputs in a way that is not followed."""
    name = equation.primitive.name
    for value in inputs:
        how = f"{why or _WORDS.get(name, f'goes through {name}')} in "
        ledger.consume(value, how + ledger.where(equation), name)
    return [None] * len(equation.outvars)


def _change(change: Callable[[Any], Change]) -> Rule:
    """Make the rule of a primitive that changes the axes of its first input alone."""

    def rule(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
        first, *rest = inputs
        _lose(equation, rest, ledger)
        if first is None:
            return [None]
        changed = first.change(change(equation))
        return [changed] if changed else _lose(equation, [first], ledger)

    return rule


def _shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, out = equation.invars[0].aval, equation.outvars[0].aval
    return tuple(first.shape), tuple(out.shape)


def _transpose(equation: Any) -> Change:
    order = equation.params["permutation"]
    return lambda dims: tuple(dims[axis] for axis in order)


def _squeeze(equation: Any) -> Change:
    gone = equation.params["dimensions"]
    return lambda dims: tuple(d for axis, d in enumerate(dims) if axis not in gone)


def _reshape(equation: Any) -> Change:
    before, after = _shapes(equation)
    return lambda dims: regroup(dims, before, after)


def _slice(equation: Any) -> Change:
    """Take one of a stack, or all; anything between is not followed."""
    before, after = _shapes(equation)

    def change(dims: Dims) -> Dims | None:
        if any(n not in (m, 1) for n, m in zip(after, before, strict=True)):
            return None
        return tuple(
            d if n == m else () for d, n, m in zip(dims, after, before, strict=True)
        )

    return change


def _broadcast(equation: Any) -> Change:
    (before, after), places = _shapes(equation), equation.params["broadcast_dimensions"]

    def change(dims: Dims) -> Dims:
        spread: list = [()] * len(after)
        for axis, place in enumerate(places):
            spread[place] = dims[axis] if before[axis] == after[place] else ()
        return tuple(spread)

    return change


def _keep(equation: Any) -> Change:
    del equation
    return lambda dims: dims


def _cast(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Follow a cast from one float type to another."""
    types = (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
    if all(jnp.issubdtype(each, jnp.floating) for each in types):
        return inputs
    return _lose(equation, inputs, ledger)


def _indexed(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Take one of a stack of parameters, by a number."""
    if not isinstance(inputs[0], Param):
        return _lose(equation, inputs, ledger)
    return _change(_slice)(equation, inputs, ledger)


def _fixed(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Pass parameters on that are constants to the gradient."""
    if isinstance(inputs[0], Param):
        return inputs
    return _lose(equation, inputs, ledger)


def _add(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Add to contractions; what is added is noted."""
    if not any(isinstance(value, Sum) for value in inputs):
        return _lose(equation, inputs, ledger)
    terms: list = []
    added: list[Param | None] = []
    for value in inputs:
        if isinstance(value, Sum):
            terms += value.terms
            added += value.added
        else:
            added.append(value if isinstance(value, Param) else None)
            ledger.consume(value, f"is added to a product in {ledger.where(equation)}")
    return [Sum(tuple(terms), tuple(added))]


def _subtract(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Subtract from contractions."""
    if not isinstance(inputs[0], Sum) or isinstance(inputs[1], Sum):
        return _lose(equation, inputs, ledger)
    ledger.consume(inputs[1], f"is subtracted in {ledger.where(equation)}")
    return [inputs[0]._replace(added=(*inputs[0].added, None))]


def _dot(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Contract a candidate with an input of its method."""
    places = [n for n, v in enumerate(inputs) if _candidate(v, ledger)]
    if len(places) != 1:
        return _lose(equation, inputs, ledger)
    at = places[0]
    kernel, other = inputs[at], inputs[1 - at]
    if not isinstance(other, Input):
        words = "is contracted with what is no plain input of its method"
        return _lose(equation, inputs, ledger, words)
    contracted, batch = equation.params["dimension_numbers"]
    pairs = [
        list(zip(axes[1 - at], axes[at], strict=True)) for axes in (contracted, batch)
    ]
    products = [multiply(view, kernel, *pairs, at == 0) for view in other.views]
    known: list[Product] = [product for product in products if product]
    if not known:
        words = "is contracted over axes that are no whole axes of both"
        return _lose(equation, inputs, ledger, words)
    return [ledger.contract(kernel, known)]


def _candidate(value: Value, ledger: Ledger) -> bool:
    return isinstance(value, Param) and value.source in ledger.candidates


def _scan(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Enter a scan's body; what comes out stacked has the axis again."""
    body = equation.params["jaxpr"].jaxpr
    outside = _unstacked(equation.invars, body.invars)
    carried = _unstacked(equation.outvars, body.outvars)
    stacked = [_first(value, equation, ledger) for value in inputs[outside:]]
    start = outside - carried

    def run(carry: Sequence[Value], ledger: Ledger) -> list[Value]:
        return follow(body, [*inputs[:start], *carry, *stacked], ledger)

    outputs = _loop(equation, run, inputs[start:outside], ledger)
    taken = {
        value.source: value
        for value, inner in zip(inputs[outside:], stacked, strict=True)
        if isinstance(value, Param) and inner is not None
    }

    def restack(y: Value) -> Value:
        if isinstance(y, Param) and y.source in taken:
            return Param(y.source, (taken[y.source].dims[0], *y.dims))
        _lose(equation, [y], ledger)
        return None

    return [*outputs[:carried], *map(restack, outputs[carried:])]


def _first(value: Value, equation: Any, ledger: Ledger) -> Value:
    """Take the first axis of what a scan goes over."""
    if isinstance(value, Param):
        return Param(value.source, value.dims[1:])
    _lose(equation, [value], ledger)
    return None


def _loop(
    equation: Any,
    run: Callable[[Sequence[Value], Ledger], list[Value]],
    carry: Sequence[Value],
    ledger: Ledger,
) -> list[Value]:
    """Run a loop's body; what is carried is followed where the body passes it on."""
    carry = list(carry)
    while any(carry):
        outputs = run(carry, ledger.fork())
        kept = [v if v == y else None for v, y in zip(carry, outputs, strict=False)]
        if kept == carry:
            break
        changed = [v for v, k in zip(carry, kept, strict=True) if v != k]
        _lose(equation, changed, ledger, "is carried and changed by a loop")
        carry = kept
    outputs = run(carry, ledger)
    for place, (value, y) in enumerate(zip(carry, outputs, strict=False)):
        if value is None:
            _lose(equation, [y], ledger, "is carried on by a loop")
            outputs[place] = None
    return outputs


def _unstacked(around: Sequence[Any], within: Sequence[Any]) -> int:
    """Count the arrays that a scan passes on whole; they come before the stacked ones.

    JAX's own counts have other names from version to version.
    """
    pairs = zip(around, within, strict=True)
    return sum(outer.aval.ndim == inner.aval.ndim for outer, inner in pairs)


def _while(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    params = equation.params
    tested = params["cond_nconsts"]
    own = tested + params["body_nconsts"]

    def run(carry: Sequence[Value], ledger: Ledger) -> list[Value]:
        follow(params["cond_jaxpr"].jaxpr, [*inputs[:tested], *carry], ledger)
        body = params["body_jaxpr"].jaxpr
        return follow(body, [*inputs[tested:own], *carry], ledger)

    return _loop(equation, run, inputs[own:], ledger)


def _cond(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Enter all branches; an output is followed where they agree on it."""
    branches = equation.params["branches"]
    outputs = [follow(branch.jaxpr, inputs[1:], ledger) for branch in branches]

    def agreed(values: Sequence[Value]) -> Value:
        if all(value == values[0] for value in values):
            return values[0]
        _lose(equation, values, ledger, "comes out of one branch of a condition")
        return None

    return [agreed(values) for values in zip(*outputs, strict=True)]


def _other(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Enter what calls a program with its own inputs: jit, remat, custom rules."""
    for inner in _programs(equation):
        shapes = [
            [atom.aval.shape for atom in atoms]
            for atoms in (
                inner.invars,
                equation.invars,
                inner.outvars,
                equation.outvars,
            )
        ]
        if shapes[0] == shapes[1] and shapes[2] == shapes[3]:
            return follow(inner, inputs, ledger)
    return _lose(equation, inputs, ledger)


_MARKS: dict[Any, Callable[[Ledger, Any, Sequence[Value]], list[Value]]] = {
    ENTER: Ledger.enter,
    LEAVE: Ledger.leave,
    CLAIM: Ledger.claim,
}

_WORDS = {
    "add": "is added, not contracted,",
    "mul": "is multiplied",
    "div": "is divided",
    "gather": "is read by index",
    "dot_general": "is contracted by no call of the module that owns it",
    "conv_general_dilated": "is convolved",
    "slice": "is cut",
    "dynamic_slice": "is cut",
    "reshape": "has its axes changed by a reshape",
}

_RULES: dict[str, Rule] = {
    "add": _add,
    "add_any": _add,
    "broadcast_in_dim": _change(_broadcast),
    "cond": _cond,
    "convert_element_type": _cast,
    "dot_general": _dot,
    "dynamic_slice": _indexed,
    "optimization_barrier": lambda equation, inputs, ledger: inputs,
    "reshape": _change(_reshape),
    "scan": _scan,
    "slice": _indexed,
    "squeeze": _change(_squeeze),
    "stop_gradient": _fixed,
    "sub": _subtract,
    "transpose": _change(_transpose),
    "while": _while,
    **dict.fromkeys(
        ("copy", "copy_p", "name", "reduce_precision", "sharding_constraint"),
        _change(_keep),
    ),
}
