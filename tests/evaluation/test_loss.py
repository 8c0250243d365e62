from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.table_model import logit_table, lookup, token_rows
from tsd_jax.evaluation.loss import (
    next_token_loss,
    sequence_log_likelihood,
    token_log_likelihood,
)

VOCABULARY = 11


@pytest.fixture(scope="module")
def variables():
    return logit_table(VOCABULARY, 4)


@pytest.fixture(scope="module")
def batch():
    return token_rows(VOCABULARY, 6, 5)


def reference(variables, batch):
    """Weighted log-likelihoods by the plain formula, in float64."""
    logits = np.asarray(variables["table"], np.float64)[batch["tokens"]]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows, places = np.indices(batch["targets"].shape)
    return np.log(probability[rows, places, batch["targets"]]) * batch["weights"]


def test_loss_is_the_weighted_sum(variables, batch):
    loss, count = next_token_loss(lookup)(variables, batch)
    np.testing.assert_allclose(loss, -reference(variables, batch).sum(), rtol=1e-5)
    assert count == batch["weights"].sum()
    assert loss.dtype == count.dtype == jnp.float32


def test_score_is_the_sum_of_each_row(variables, batch):
    scores = sequence_log_likelihood(lookup)(variables, batch)
    expected = reference(variables, batch).sum(-1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_losses_add_up_over_unequal_micro_batches(variables, batch):
    loss_fn = next_token_loss(lookup)
    whole = loss_fn(variables, batch)
    parts = [
        loss_fn(variables, {name: array[cut] for name, array in batch.items()})
        for cut in (slice(0, 1), slice(1, 6))
    ]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-6)


def test_gradient_is_probability_minus_target(variables, batch):
    gradient = jax.grad(lambda v: next_token_loss(lookup)(v, batch)[0])(variables)
    logits = np.asarray(variables["table"], np.float64)[batch["tokens"]]
    error = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    error -= np.eye(VOCABULARY)[batch["targets"]]
    expected = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(expected, batch["tokens"], error * batch["weights"][..., None])
    np.testing.assert_allclose(gradient["table"], expected, atol=1e-5)


def test_low_precision_logits_are_normalised_in_float32():
    # In bfloat16, log sum exp of 1000 equal logits is 6.90625, 0.0015 off.
    got = token_log_likelihood(jnp.zeros((1, 1000), jnp.bfloat16), jnp.zeros(1, int))
    np.testing.assert_allclose(got, [-np.log(1000)], rtol=1e-6)
    assert got.dtype == jnp.float32
