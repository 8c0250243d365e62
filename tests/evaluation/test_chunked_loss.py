from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.helpers.table_model import token_rows
from tsd_jax.binding.follow import inner_programs
from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.chunked_loss import (
    SplitModel,
    chunked_next_token_loss,
    chunked_sequence_log_likelihood,
    most_counted,
)

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 10, 6, 37
BATCH = token_rows(VOCABULARY, ROWS, LENGTH)
COUNTED = most_counted(BATCH["weights"])
A_POSITION = 4 * VOCABULARY * ROWS
"""Bytes of the logits of one position of all rows."""

MODEL = SplitModel(
    hidden=lambda variables, tokens: jnp.tanh(variables["table"][tokens]),
    head=lambda variables, x: x @ variables["head"],
    head_variables=lambda variables: {"head": variables["head"]},
    vocabulary=VOCABULARY,
)
RNG = np.random.default_rng(0)
VARIABLES = {
    "table": jnp.asarray(RNG.normal(size=(VOCABULARY, WIDTH)), jnp.float32),
    "head": jnp.asarray(RNG.normal(size=(WIDTH, VOCABULARY)), jnp.float32),
}


def reference(variables, batch):
    """Weighted log-likelihoods and the gradient of their sum, in float64."""
    table, head = (np.asarray(variables[n], np.float64) for n in ("table", "head"))
    x = np.tanh(table[batch["tokens"]])
    probability = np.exp(x @ head)
    probability /= probability.sum(-1, keepdims=True)
    rows, places = np.indices(batch["targets"].shape)
    likelihood = np.log(probability[rows, places, batch["targets"]])
    error = np.eye(VOCABULARY)[batch["targets"]] - probability
    error *= batch["weights"][..., None]
    of_table = np.zeros_like(table)
    np.add.at(of_table, batch["tokens"], (error @ head.T) * (1 - x**2))
    of_head = np.einsum("btd,btv->dv", x, error)
    return likelihood * batch["weights"], {"table": of_table, "head": of_head}


def differentiated(trained, loss_fn):
    def loss(values):
        return loss_fn({**VARIABLES, **values}, BATCH)

    values = {name: VARIABLES[name] for name in trained}
    return jax.value_and_grad(loss, has_aux=True)(values)


@pytest.mark.parametrize("trained", [["table"], ["head"], ["table", "head"]])
@pytest.mark.parametrize("counted", [None, COUNTED, COUNTED + 1])
@pytest.mark.parametrize("positions", [1, 3, None])
def test_loss_and_gradient_are_those_of_all_logits(trained, counted, positions):
    limit = positions and positions * A_POSITION
    loss_fn = chunked_next_token_loss(MODEL, counted=counted, chunk_bytes=limit)
    (loss, count), gradient = jax.jit(
        functools.partial(differentiated, trained, loss_fn)
    )()
    likelihood, expected = reference(VARIABLES, BATCH)
    np.testing.assert_allclose(loss, -likelihood.sum(), rtol=1e-6)
    assert count == BATCH["weights"].sum()
    assert sorted(gradient) == sorted(trained)
    for name, found in gradient.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found, -expected[name], atol=1e-6 * scale)


@pytest.mark.parametrize("counted", [None, COUNTED])
def test_scores_are_sums_of_rows(counted):
    score_fn = chunked_sequence_log_likelihood(
        MODEL, counted=counted, chunk_bytes=2 * A_POSITION
    )
    expected = reference(VARIABLES, BATCH)[0].sum(-1)
    np.testing.assert_allclose(score_fn(VARIABLES, BATCH), expected, rtol=1e-6)


def test_a_row_that_counts_more_is_no_number():
    """A loss that leaves something out would be wrong without a word."""
    fewer = COUNTED - 1
    loss, _ = chunked_next_token_loss(MODEL, counted=fewer)(VARIABLES, BATCH)
    scores = chunked_sequence_log_likelihood(MODEL, counted=fewer)(VARIABLES, BATCH)
    assert np.isnan(loss)
    assert np.isnan(scores).all()


def test_weights_of_any_size_count():
    batch = {**BATCH, "weights": BATCH["weights"] * np.float32(0.25)}
    loss, count = chunked_next_token_loss(MODEL, counted=COUNTED)(VARIABLES, batch)
    np.testing.assert_allclose(loss, -reference(VARIABLES, batch)[0].sum(), rtol=1e-6)
    assert count == 0.25 * BATCH["weights"].sum()


def products(jaxpr) -> list[tuple[int, ...]]:
    """Return the output shapes of all products of a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.outvars[0].aval.shape)
        for inner in inner_programs(equation):
            found += products(inner)
    return found


@pytest.mark.parametrize("trained", [["table"], ["table", "head"]])
def test_no_logits_are_kept_and_none_computed_twice(trained):
    """A chunk's logits, its gradient, and what trains of the head: nothing else."""
    loss_fn = chunked_next_token_loss(MODEL, chunk_bytes=2 * A_POSITION)
    program = jax.make_jaxpr(functools.partial(differentiated, trained, loss_fn))()
    found = products(program.jaxpr)
    expected: list[tuple[int, ...]] = [(ROWS, 2, VOCABULARY), (ROWS, 2, WIDTH)]
    if "head" in trained:
        expected.append((VOCABULARY, WIDTH))
    assert sorted(found) == sorted(expected)


def test_rows_stay_where_they_are():
    """On four devices no logits are gathered, and values are those of one."""
    mesh = Mesh(np.array(jax.devices()[:ROWS]), "data")
    rows = NamedSharding(mesh, PartitionSpec("data"))
    loss_fn = chunked_next_token_loss(
        MODEL, counted=COUNTED, chunk_bytes=2 * A_POSITION
    )
    gradient = jax.jit(
        jax.grad(lambda table, batch: loss_fn({**VARIABLES, "table": table}, batch)[0])
    )
    batch = jax.device_put(BATCH, rows)
    compiled = gradient.lower(VARIABLES["table"], batch).compile()
    text = str(compiled.as_text())
    assert "all-gather" not in text
    assert f"f32[1,2,{VOCABULARY}]" in text
    np.testing.assert_allclose(
        compiled(VARIABLES["table"], batch),
        -reference(VARIABLES, BATCH)[1]["table"],
        atol=1e-5,
    )


def test_most_counted():
    assert most_counted(np.array([[0, 1, 0.5], [1, 0, 0]])) == 2
    assert most_counted(np.zeros((2, 3))) == 1


def test_counting_nothing_is_refused():
    with pytest.raises(InputError, match="counted is 0; it must be at least 1"):
        chunked_next_token_loss(MODEL, counted=0)(VARIABLES, BATCH)
