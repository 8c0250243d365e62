from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.trees import small_spec, trained
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.extraction.launch_checks import check_adapters, check_rates, is_traced

SPEC = small_spec("tsd")


def changed(path: str = "stack", **leaves: Any) -> Trainable:
    """Return trained adapters, of which one has other leaves."""
    trainable = trained(0, SPEC)[0]
    other = trainable.adapters[path].replace(**leaves)
    return Trainable(adapters={**trainable.adapters, path: other})


B, GAIN = (3, 2, 7), (3, 4)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"b": jnp.zeros(B)}, "stack: its B is zero, so there is no change.*launch l"),
        ({"b": jnp.ones(B).at[1, 0, 3].set(jnp.nan)}, "stack: its adapter is not fini"),
        ({"gain": jnp.zeros(GAIN).at[2, 0].set(0.1)}, "stack: its gains are not zero"),
        ({"magnitude": jnp.array([1.0, jnp.inf])}, "stack: its adapter is not finite"),
    ],
    ids=["zero", "nan", "launched", "magnitude"],
)
def test_adapters_that_cannot_launch(leaves, message):
    with pytest.raises(InputError, match=f"cannot launch {message}"):
        check_adapters(changed(**leaves), SPEC, ranks_learned=True)


def test_trained_adapters_pass():
    check_adapters(trained(0, SPEC)[0], SPEC, ranks_learned=True)
    one_layer = jnp.zeros(B).at[0, 0, 0].set(1e-30)
    check_adapters(changed(b=one_layer), SPEC, ranks_learned=True)
    check_adapters(changed(b=jnp.zeros(B)), SPEC, ranks_learned=False)


@pytest.mark.parametrize(
    ("rates", "learned", "message"),
    [
        ([0.0, 0.0], True, "all its change rates are 0; launch later, or raise the le"),
        ([0.0, 0.0], False, "all its change rates are 0; pass a delta that is not ze"),
        ([0.1, np.nan], True, "rates are not finite; .* not finite in the base$"),
        ([np.inf, 0.1], False, "not finite in the delta or the base$"),
    ],
)
def test_rates_that_rank_nothing(rates, learned, message):
    rates = jnp.asarray(rates)
    with pytest.raises(InputError, match=f"cannot launch k: .*{message}"):
        check_rates("k", rates, get_method("tsd"), learned=learned)
    check_rates("k", rates, get_method("pissa"), learned=learned)
    check_rates("k", jnp.array([0.0, 1e-9]), get_method("tsd"), learned=learned)


def test_tracers_pass():
    method = get_method("tsd")

    @jax.jit
    def checked(trainable: Any):
        assert is_traced(trainable)
        check_adapters(trainable, SPEC, ranks_learned=True)
        check_rates("k", trainable.adapters["k"].gain, method, learned=True)
        return trainable

    checked(changed(b=jnp.zeros(B)))
    assert not is_traced(trained(0, SPEC)[0])
