"""`tsd.check`, and what is said of calls that are not meant."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import tsd_jax as tsd
from tests.helpers.models import inputs, net
from tests.helpers.trees import random_all

RULES = [tsd.Rule(pattern=".*kernel", rank=2, directions=2)]


@pytest.mark.parametrize(
    ("dtype", "dora"),
    [(jnp.float32, False), (jnp.float32, True), (jnp.bfloat16, False)],
)
def test_a_right_model_passes(dtype, dora):
    model, params, spec = net("scan of remat", "tsd", dtype=dtype, dora=dora)
    tsd.check(model.apply, {"params": params}, spec, inputs("scan of remat", dtype))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="wrong")(nn.Dense(4, name="right")(x))


def test_a_wrong_adapter_is_named():
    """Twice the low-rank path of one kernel."""
    model, x = Two(), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    spec = tsd.make_spec(model.apply, {"params": params}, RULES, x)

    def apply(variables, x):
        """Double one kernel's low-rank path."""
        bound = variables["params"]["wrong"].get("kernel_tsd")
        if bound is not None:
            wrong = {
                **variables["params"]["wrong"],
                "kernel_tsd": bound.replace(up=2 * bound.up),
            }
            variables = {"params": {**variables["params"], "wrong": wrong}}
        return model.apply(variables, x)

    with pytest.raises(
        tsd.InputError, match=r"^wrong/kernel: .* differs from the merged"
    ):
        tsd.check(apply, {"params": params}, spec, x)


def test_a_model_that_looks_at_its_parameters_is_named():
    model, x = nn.Dense(4), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    spec = tsd.make_spec(model.apply, {"params": params}, RULES, x)

    def apply(variables, x):
        return model.apply(variables, x) * len(variables["params"])

    with pytest.raises(tsd.InputError, match="add nothing the model differs"):
        tsd.check(apply, {"params": params}, spec, x)


MODEL, X = nn.Dense(4), jnp.ones((2, 4))
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
ALL = {"params": PARAMS}
SPEC = tsd.make_spec(MODEL.apply, ALL, RULES, X)
PAIR = random_all(0, SPEC)

MISTAKES: dict[str, tuple[Any, str]] = {
    "the model": (
        lambda: tsd.make_spec(MODEL, ALL, RULES, X),  # pyright: ignore[reportArgumentType]
        r"Dense was given where a model's apply is needed: give model\.apply",
    ),
    "the model, adapted": (lambda: tsd.adapted(MODEL), r"give model\.apply"),  # pyright: ignore[reportArgumentType]
    "bare params": (
        lambda: tsd.make_spec(MODEL.apply, PARAMS, RULES, X),
        'give {"params": params}',
    ),
    "nnx to linen": (
        lambda: tsd.make_spec(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), ALL, RULES, X),
        r"Linear is an NNX model: use tsd_jax\.nnx",
    ),
    "linen to nnx": (
        lambda: tsd.nnx.make_spec(MODEL, RULES, X),  # pyright: ignore[reportArgumentType]
        r"Dense is no NNX model: .* use tsd_jax\.make_spec",
    ),
    "a lone rule": (
        lambda: tsd.make_spec(MODEL.apply, ALL, RULES[0], X),  # pyright: ignore[reportArgumentType]
        "rules are a list",
    ),
    "no directions": (
        lambda: tsd.bind(PARAMS, PAIR[0], {}),
        "kernel has no directions: give both",
    ),
    "no directions, merge": (
        lambda: tsd.merge(PARAMS, PAIR[0], {}),
        "kernel has no directions: give both",
    ),
    "both at once": (
        lambda: tsd.bind(PARAMS, PAIR, PAIR[1]),  # pyright: ignore[reportArgumentType]
        "a tuple was given for what trains",
    ),
}


@pytest.mark.parametrize(("call", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_calling_gets_a_line_that_says_what_to_do(call, words):
    with pytest.raises(tsd.InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
