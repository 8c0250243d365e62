from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.classification import (
    LOSSES,
    classification_scores,
    make_logits,
    predict,
    regression_scores,
)

RNG = np.random.default_rng(0)


def apply_fn(variables, tokens, positions, mask, token_types):
    """Count what is seen, in as many ways as there are labels."""
    assert positions is None
    seen = jnp.where(mask, tokens + 3 * token_types, 0).sum(axis=1)
    return seen[:, None].astype(jnp.float32) @ variables


def batch(rows=7, length=5, kind: Any = np.int32):
    return {
        "tokens": RNG.integers(1, 9, (rows, length)).astype(np.int32),
        "mask": RNG.integers(0, 2, (rows, length)).astype(np.int32),
        "token_types": RNG.integers(0, 2, (rows, length)).astype(np.int32),
        "targets": RNG.integers(0, 3, (rows, 1)).astype(kind),
        "weights": np.ones((rows, 1), np.float32),
    }


def logits_by_hand(arrays, weights):
    seen = (arrays["mask"] * (arrays["tokens"] + 3 * arrays["token_types"])).sum(1)
    return seen[:, None] * weights.astype(np.float64)


def test_the_loss_of_classes_is_the_summed_cross_entropy():
    arrays, weights = batch(), RNG.normal(size=(1, 3)).astype(np.float32) / 9
    arrays["weights"][2] = 0
    z = logits_by_hand(arrays, weights)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    each = -np.log(p[np.arange(7), arrays["targets"][:, 0]])
    loss, count = LOSSES["classification"](apply_fn)(weights, arrays)
    np.testing.assert_allclose(loss, np.delete(each, 2).sum(), rtol=1e-5)
    assert count == 6


def test_the_loss_of_numbers_is_the_summed_squared_error():
    arrays, weights = batch(kind=np.float32), np.asarray([[0.1]], np.float32)
    arrays["weights"][2] = 0
    each = (logits_by_hand(arrays, weights) - arrays["targets"])[:, 0] ** 2
    loss, count = LOSSES["regression"](apply_fn)(weights, arrays)
    np.testing.assert_allclose(loss, np.delete(each, 2).sum(), rtol=1e-5)
    assert count == 6


@pytest.mark.parametrize("size", [3, 7, 16])
def test_every_row_is_predicted_once_by_one_program(size):
    arrays, weights = batch(), RNG.normal(size=(1, 3)).astype(np.float32)
    traces = []

    def counted(*arguments):
        traces.append(size)
        return apply_fn(*arguments)

    found = predict(make_logits(counted), weights, arrays, size)
    np.testing.assert_allclose(found, logits_by_hand(arrays, weights), rtol=1e-5)
    assert len(traces) == 1


def test_scores_of_two_classes_by_hand():
    """3 right ones of class 1, 2 false ones, 1 missed, 4 right ones of class 0."""
    targets = np.asarray([1] * 4 + [0] * 6)
    found = np.asarray([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    logits = np.stack([1.0 - found, found * 1.0], axis=1)
    scores = classification_scores(logits, targets)
    assert scores["accuracy"] == pytest.approx(0.7)
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    other = classification_scores(logits, targets, positive=0)
    assert other["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    matthews = (3 * 4 - 2 * 1) / np.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert scores["matthews"] == pytest.approx(matthews)
    right, wrong = np.log(1 + np.exp(-1)), np.log(1 + np.exp(1))
    assert scores["loss"] == pytest.approx((7 * right + 3 * wrong) / 10)
    assert scores["count"] == 10


def test_scores_of_three_classes():
    """F1 is the mean over classes; Matthews' is the correlation of indicators."""
    targets, found = RNG.integers(0, 3, 50), RNG.integers(0, 3, 50)
    found[:25] = targets[:25]
    scores = classification_scores(np.eye(3)[found], targets)
    each = []
    for label in range(3):
        hits = np.sum((found == label) & (targets == label))
        each.append(2 * hits / (np.sum(found == label) + np.sum(targets == label)))
    assert scores["f1"] == pytest.approx(np.mean(each))
    one, other = np.eye(3)[targets], np.eye(3)[found]
    one, other = one - one.mean(0), other - other.mean(0)
    wanted = np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2))
    assert scores["matthews"] == pytest.approx(wanted)


def test_one_answer_to_everything_is_no_correlation():
    scores = classification_scores(np.eye(2)[[0, 0, 0]], np.asarray([0, 1, 1]))
    assert scores["matthews"] == scores["f1"] == 0
    scores = regression_scores(np.ones((3, 1)), np.asarray([0.0, 1.0, 2.0]))
    assert scores["pearson"] == scores["spearman"] == 0


def test_a_row_that_is_not_finite_is_wrong():
    logits = np.asarray([[np.nan, 0], [0, 1]], np.float32)
    assert classification_scores(logits, np.asarray([0, 1]))["accuracy"] == 0.5


def test_scores_of_numbers():
    targets = np.round(RNG.normal(size=40), 1)  # with ties
    found = np.round(targets + RNG.normal(size=40), 1)
    scores = regression_scores(found[:, None], targets)
    assert scores["pearson"] == pytest.approx(np.corrcoef(found, targets)[0, 1])

    def ranks(values):
        return [np.mean([0.5 * (v == x) + (x < v) for x in values]) for v in values]

    wanted = np.corrcoef(ranks(found), ranks(targets))[0, 1]
    assert scores["spearman"] == pytest.approx(wanted)
    assert scores["mse"] == pytest.approx(np.mean((found - targets) ** 2))


def test_nothing_to_score_is_refused():
    with pytest.raises(InputError, match="no rows to score"):
        classification_scores(np.zeros((0, 2)), np.zeros(0, int))
