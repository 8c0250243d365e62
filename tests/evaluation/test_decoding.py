from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.cacheless import lookup, random_table, rows_of
from tsd_jax.evaluation import decoding
from tsd_jax.evaluation.sampling import Sampling

TABLE = random_table(7)
NEW = 5


def same(cache):
    return cache


def begun(tokens, apply_fn=lookup):
    rows, variables = rows_of(tokens), {"table": jnp.asarray(TABLE)}
    state = decoding.start(
        apply_fn, variables, rows, max_new_tokens=NEW, place_cache=same
    )
    return variables, rows, state


def advanced(variables, rows, state, until, stopped=(False, False), **more):
    given = {"eos_ids": np.zeros(0, np.int32), "sampling": None, "key": None}
    return decoding.advance(
        lookup,
        variables,
        rows,
        state,
        stopped=np.asarray(stopped),
        until=np.int32(until),
        **given | more,
    )


def chain(token, number):
    """Return the likeliest tokens after one."""
    made = []
    for _ in range(number):
        token = int(np.argmax(TABLE[token]))
        made.append(token)
    return made


def test_steps_go_on_where_they_stopped():
    variables, rows, state = begun([[2, 3], [2, 5]])
    state = advanced(variables, rows, state, 2)
    assert int(state.step) == 2
    state = advanced(variables, rows, state, NEW)
    assert state.out.tolist() == [chain(3, NEW), chain(5, NEW)]
    assert state.lengths.tolist() == [NEW, NEW]


def test_a_row_that_was_stopped_stays_as_it_is():
    variables, rows, state = begun([[3], [5]])
    state = advanced(variables, rows, state, 2)
    state = advanced(variables, rows, state, NEW, stopped=(True, False))
    assert state.lengths.tolist() == [2, NEW]
    assert state.out[0, :2].tolist() == chain(3, 2)
    assert state.out[1].tolist() == chain(5, NEW)


def test_the_cache_has_a_slot_for_every_token_that_is_read():
    made = []

    def sized(variables, tokens, **kwargs):
        if "cache" not in variables:
            made.append(tokens.shape)
        return lookup(variables, tokens, **kwargs)

    begun([[1, 2, 3, 4]] * 3, sized)
    assert made == [(3, 4 - 1 + NEW)]  # the last new token is not read


def test_sampled_chains_follow_the_table():
    count = 20_000
    variables, rows, state = begun([[3]] * count)
    state = advanced(
        variables,
        rows,
        state,
        2,
        stopped=np.zeros(count, bool),
        sampling=Sampling(temperature=0.5),
        key=jax.random.key(0),
    )
    chance = np.exp(TABLE.astype(float) / 0.5)
    chance /= chance.sum(-1, keepdims=True)
    both = np.zeros((7, 7))
    np.add.at(both, tuple(np.asarray(state.out[:, :2]).T), 1 / count)
    # Five standard deviations of the most uncertain frequency.
    np.testing.assert_allclose(both, chance[3][:, None] * chance, atol=0.018)
