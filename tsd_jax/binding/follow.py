"""Follow parameters through a traced program, to everything that uses them.

A transform that hands a stack's layers to a function one by one takes an axis away.
Which one is written in the program: `scan` takes the first, after the transposes
before it, and marks are told where `vmap` put it. Indexing is followed as well. What
cannot be followed is noted as a use of the parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex

from tsd_jax.binding.equations import EQUATIONS, Rule, lose
from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import CLAIM, ENTER, LEAVE
from tsd_jax.binding.values import Param, Value


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
    return equation.primitive in _MARKS or bool(inner_programs(equation))


def inner_programs(equation: Any) -> list[jex.Jaxpr]:
    """Return the programs inside an equation.

    Args:
      equation: of a program.
    """
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = each.jaxpr if isinstance(each, jex.ClosedJaxpr) else each
            if isinstance(inner, jex.Jaxpr):
                found.append(inner)
    return found


def primitives(jaxpr: jex.Jaxpr) -> Counter[str]:
    """Count the equations of a program and of those inside it, by primitive.

    Args:
      jaxpr: the program.
    """
    found = Counter(equation.primitive.name for equation in jaxpr.eqns)
    for equation in jaxpr.eqns:
        for inner in inner_programs(equation):
            found += primitives(inner)
    return found


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
        lose(equation, [y], ledger)
        return None

    return [*outputs[:carried], *map(restack, outputs[carried:])]


def _first(value: Value, equation: Any, ledger: Ledger) -> Value:
    """Take the first axis of what a scan goes over."""
    if isinstance(value, Param):
        return Param(value.source, value.dims[1:])
    lose(equation, [value], ledger)
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
        lose(equation, changed, ledger, "is carried and changed by a loop")
        carry = kept
    outputs = run(carry, ledger)
    for place, (value, y) in enumerate(zip(carry, outputs, strict=False)):
        if value is None:
            lose(equation, [y], ledger, "is carried on by a loop")
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
        lose(equation, values, ledger, "comes out of one branch of a condition")
        return None

    return [agreed(values) for values in zip(*outputs, strict=True)]


def _other(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Enter what calls a program with its own inputs: jit, remat, custom rules."""
    for inner in inner_programs(equation):
        shapes = [
            [getattr(atom.aval, "shape", ()) for atom in atoms]
            for atoms in (
                inner.invars,
                equation.invars,
                inner.outvars,
                equation.outvars,
            )
        ]
        if shapes[0] == shapes[1] and shapes[2] == shapes[3]:
            return follow(inner, inputs, ledger)
    return lose(equation, inputs, ledger)


_MARKS: dict[Any, Callable[[Ledger, Any, Sequence[Value]], list[Value]]] = {
    ENTER: Ledger.enter,
    LEAVE: Ledger.leave,
    CLAIM: Ledger.claim,
}

_RULES: dict[str, Rule] = {
    **EQUATIONS,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
