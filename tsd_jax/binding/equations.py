"""How one equation of a program passes parameters and their contractions on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from tsd_jax.binding.ledger import Ledger
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
"""(equation, values of its inputs, ledger) -> values of its outputs."""

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


def lose(
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
        lose(equation, rest, ledger)
        if first is None:
            return [None]
        changed = first.change(change(equation))
        return [changed] if changed else lose(equation, [first], ledger)

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
    return lose(equation, inputs, ledger)


def _indexed(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Take one of a stack of parameters, by a number."""
    if not isinstance(inputs[0], Param):
        return lose(equation, inputs, ledger)
    return _change(_slice)(equation, inputs, ledger)


def _fixed(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Pass parameters on that are constants to the gradient."""
    if isinstance(inputs[0], Param):
        return inputs
    return lose(equation, inputs, ledger)


def _add(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Add to contractions; what is added is noted."""
    if not any(isinstance(value, Sum) for value in inputs):
        return lose(equation, inputs, ledger)
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
        return lose(equation, inputs, ledger)
    ledger.consume(inputs[1], f"is subtracted in {ledger.where(equation)}")
    return [inputs[0]._replace(added=(*inputs[0].added, None))]


def _dot(equation: Any, inputs: list[Value], ledger: Ledger) -> list[Value]:
    """Contract a candidate with an input of its method."""
    places = [n for n, v in enumerate(inputs) if _candidate(v, ledger)]
    if len(places) != 1:
        return lose(equation, inputs, ledger)
    at = places[0]
    kernel, other = inputs[at], inputs[1 - at]
    if not isinstance(other, Input) or not isinstance(kernel, Param):
        words = "is contracted with what its method computes, not with an input,"
        return lose(equation, inputs, ledger, words)
    contracted, batch = equation.params["dimension_numbers"]
    sums, stays = (
        list(zip(axes[1 - at], axes[at], strict=True)) for axes in (contracted, batch)
    )
    products = [multiply(view, kernel, sums, stays, at == 0) for view in other.views]
    known: list[Product] = [product for product in products if product]
    if not known:
        words = "is contracted over axes that are no whole axes of both"
        return lose(equation, inputs, ledger, words)
    return [ledger.contract(kernel, known)]


def _candidate(value: Value, ledger: Ledger) -> bool:
    return isinstance(value, Param) and value.source in ledger.candidates


EQUATIONS: dict[str, Rule] = {
    "add": _add,
    "add_any": _add,
    "broadcast_in_dim": _change(_broadcast),
    "convert_element_type": _cast,
    "dot_general": _dot,
    "dynamic_slice": _indexed,
    "optimization_barrier": lambda equation, inputs, ledger: inputs,
    "reshape": _change(_reshape),
    "slice": _indexed,
    "squeeze": _change(_squeeze),
    "stop_gradient": _fixed,
    "sub": _subtract,
    "transpose": _change(_transpose),
    **dict.fromkeys(
        ("copy", "copy_p", "name", "reduce_precision", "sharding_constraint"),
        _change(_keep),
    ),
}
"""{primitive without a program inside: how it is followed}."""
