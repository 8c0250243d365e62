from __future__ import annotations

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.table_model import logit_table, lookup, token_rows
from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.loss import next_token_loss, sequence_log_likelihood
from tsd_jax.evaluation.scoring import choices, nll

VOCABULARY = 8


@pytest.fixture(scope="module")
def variables():
    return logit_table(VOCABULARY, 3)


@pytest.fixture(scope="module")
def arrays():
    return token_rows(VOCABULARY, 7, 5)


def row_scores(variables, arrays):
    logits = np.asarray(variables["table"], np.float64)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return (table[arrays["tokens"], arrays["targets"]] * arrays["weights"]).sum(-1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_nll_does_not_depend_on_the_batch_size(variables, arrays, batch_size):
    figures = nll(next_token_loss(lookup), variables, arrays, batch_size)
    count = arrays["weights"].sum()
    expected = -row_scores(variables, arrays).sum() / count
    assert figures["nll"] == pytest.approx(expected, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert figures["tokens"] == count


def test_one_program_serves_all_calls(variables, arrays):
    loss_fn: Any = chex.assert_max_traces(next_token_loss(lookup), n=1)
    first = nll(loss_fn, variables, arrays, 3)
    fewer = {name: array[:4] for name, array in arrays.items()}
    assert nll(loss_fn, variables, fewer, 3) != first
    assert nll(jax.jit(next_token_loss(lookup)), variables, arrays, 3) == first


def test_sums_keep_their_precision(variables):
    # float32 stops counting at 2^24.
    def loss_fn(variables, batch):
        sums = jnp.where(batch["tokens"][0, 0] == 0, 2.0**24, 1.0)
        return sums, sums

    rows = {"tokens": np.asarray([[0], [1], [1]], np.int32)}
    assert nll(loss_fn, variables, rows, 1)["tokens"] == 2**24 + 2


def test_a_diverged_model_has_infinite_perplexity(variables, arrays):
    def worse(variables, tokens):
        return 1e4 * lookup(variables, tokens)

    figures = nll(next_token_loss(worse), variables, arrays, 4)
    assert figures["perplexity"] == math.inf
    assert math.isfinite(figures["nll"])


def test_sharded_parameters_and_batches_give_the_same(variables, arrays):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.device_put(variables, NamedSharding(mesh, P("fsdp")))
    seen = []

    def place(batch):
        seen.append({name: array.shape for name, array in batch.items()})
        return jax.device_put(batch, NamedSharding(mesh, P("data")))

    loss_fn, score_fn = next_token_loss(lookup), sequence_log_likelihood(lookup)
    plain = nll(loss_fn, variables, arrays, 4)
    spread = nll(loss_fn, sharded, arrays, 4, place)
    assert spread == pytest.approx(plain, rel=1e-6)
    assert seen == [dict.fromkeys(arrays, (4, 5))] * 2

    groups, labels = np.asarray([0, 0, 0, 1, 1, 2, 2]), np.asarray([0, 1, 0])
    rank = functools.partial(choices, score_fn, arrays=arrays, groups=groups)
    assert rank(variables, labels=labels, batch_size=4) == rank(
        sharded, labels=labels, batch_size=4, place=place
    )


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_choices_rank_by_summed_likelihood(variables, arrays, batch_size):
    groups = np.asarray([0, 0, 0, 1, 1, 2, 2])
    scores = row_scores(variables, arrays)
    best = [np.argmax(scores[groups == n]) for n in range(3)]
    worst = [np.argmin(scores[groups == n]) for n in range(3)]
    rank = functools.partial(
        choices, sequence_log_likelihood(lookup), variables, arrays, groups
    )
    assert rank(np.asarray(best), batch_size) == {"accuracy": 1.0, "count": 3}
    assert rank(np.asarray(worst), batch_size)["accuracy"] == 0.0
    mixed = np.asarray([best[0], worst[1], best[2]])
    assert rank(mixed, batch_size)["accuracy"] == pytest.approx(2 / 3)


def test_a_record_without_finite_scores_is_wrong(arrays):
    def broken(variables, tokens):
        return jnp.full((*tokens.shape, VOCABULARY), jnp.nan)

    figures = choices(
        sequence_log_likelihood(broken),
        {},
        {name: array[:2] for name, array in arrays.items()},
        np.zeros(2, int),
        np.zeros(1, int),
        batch_size=2,
    )
    assert figures == {"accuracy": 0.0, "count": 1}


def test_nothing_to_score_is_an_error(variables, arrays):
    silent = {**arrays, "weights": np.zeros_like(arrays["weights"])}
    with pytest.raises(InputError, match="no token to score"):
        nll(next_token_loss(lookup), variables, silent, 4)
    with pytest.raises(InputError, match="no records"):
        choices(
            sequence_log_likelihood(lookup),
            variables,
            arrays,
            np.zeros(0, int),
            np.zeros(0, int),
            batch_size=4,
        )
