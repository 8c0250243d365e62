from __future__ import annotations

import jax.numpy as jnp
import pytest
from flax import nnx

from tsd_jax.binding.nnx.handlers import HANDLERS
from tsd_jax.binding.nnx.methods import owners, see_calls, variables
from tsd_jax.core.errors import InputError


class Two(nnx.Module):
    def __init__(self):
        self.one = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.two.kernel = self.one.kernel


def test_all_modules_that_hold_a_variable_own_it():
    model = Two()
    kernel = variables(model)["one/kernel"]
    found = dict(owners(model, {id(kernel): 7}))
    assert list(found.values()) == [{"kernel": 7}, {"kernel": 7}]
    assert set(found) == {model.one, model.two}


def test_a_seen_module_is_one_of_its_class_and_computes_the_same():
    model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    want = model(x)
    see_calls(model, HANDLERS)
    assert isinstance(model, nnx.Linear)
    assert type(model) is not nnx.Linear
    assert (model(x) == want).all()
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    see_calls(other, HANDLERS)
    assert type(other) is type(model)  # compiled programs are found again


def test_what_is_no_nnx_model_is_refused():
    with pytest.raises(InputError, match="dict is no NNX model"):
        variables({})  # pyright: ignore[reportArgumentType]
