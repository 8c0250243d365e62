from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tsd_jax.binding.equations import EQUATIONS, lose
from tsd_jax.binding.ledger import Ledger
from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.values import Param, identity

SHAPE = (2, 1, 3, 5)  # so that a size tells its axis

WAYS = {
    "transpose": lambda k: lax.transpose(k, (3, 0, 2, 1)),
    "squeeze": lambda k: lax.squeeze(k, (1,)),
    "convert_element_type": lambda k: k.astype(jnp.bfloat16),
    "reshape": lambda k: lax.reshape(k, (2, 15)),
    "copy": jnp.copy,
    "name": lambda k: checkpoint_name(k, "kernel"),
}


def equation_of(function: Any) -> tuple[Any, Ledger]:
    """Return the one equation of a function of a parameter, and an empty ledger."""
    program: Any = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    ledger = Ledger(Recorder(), range(1))
    (equation,) = program.jaxpr.eqns
    return equation, ledger


@pytest.mark.parametrize("name", WAYS)
def test_what_comes_out_has_the_sizes_of_the_axes_it_is_said_to_have(name):
    equation, ledger = equation_of(WAYS[name])
    param = Param(0, identity("k", SHAPE))
    (value,) = EQUATIONS[equation.primitive.name](equation, [param], ledger)
    assert isinstance(value, Param)
    sizes = [math.prod(SHAPE[atom.axis] for atom in dim) for dim in value.dims]
    assert tuple(sizes) == equation.outvars[0].aval.shape
    assert ledger.uses == {}


def test_a_sum_with_a_parameter_is_a_use():
    equation, ledger = equation_of(lambda k: k + k)
    param = Param(0, identity("k", SHAPE))
    assert EQUATIONS["add"](equation, [param, param], ledger) == [None]
    assert ledger.uses[0][0].startswith("is added, not contracted,")


def test_what_is_lost_is_noted_with_the_primitive():
    equation, ledger = equation_of(jnp.tanh)
    assert lose(equation, [Param(0, identity("k", SHAPE))], ledger) == [None]
    assert ledger.uses[0][0].startswith("goes through tanh in ")
