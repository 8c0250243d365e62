"""Beam search against all sequences there are, and against a plain search in NumPy."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cacheless import lookup, random_table, rows_of
from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.beams import Beams, search

EOS = 0


def log_chances(table):
    exact = table.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def found(table, starts, beams, new):
    tokens, lengths = search(
        lookup,
        {"table": jnp.asarray(table)},
        rows_of([[start] for start in starts]),
        eos_ids=np.asarray([EOS], np.int32),
        beams=beams,
        max_new_tokens=new,
        place_cache=lambda cache: cache,
    )
    pairs = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [row[:end].tolist() for row, end in pairs]


def best_of_all(chances, start, new, penalty):
    """Return the best sequence that ends with EOS or is as long as may be."""
    best, text = -np.inf, []
    for size in range(1, new + 1):
        for ids in itertools.product(range(len(chances)), repeat=size):
            if EOS in ids[:-1] or (size < new and ids[-1] != EOS):
                continue
            steps = zip((start, *ids), ids, strict=False)
            score = sum(chances[one, other] for one, other in steps) / size**penalty
            if score > best:
                best, text = score, [each for each in ids if each != EOS]
    return text


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 3.0])
def test_beams_enough_find_the_best_sequence_there_is(penalty):
    table = random_table(4, scale=1.5)
    beams = Beams(number=27, length_penalty=penalty, early_stopping="never")
    expected = [best_of_all(log_chances(table), s, 3, penalty) for s in (1, 2, 3)]
    assert found(table, (1, 2, 3), beams, 3) == expected


def plain_search(chances, start, new, beams):
    """Search one prompt with lists of (score, ids) and a heap of finished ones."""
    running, kept, number = [(0.0, [start])], [], beams.number
    for size in range(1, new + 1):
        new_ones = [
            (score + chances[ids[-1], token], [*ids, token])
            for score, ids in running
            for token in range(len(chances))
        ]
        new_ones.sort(key=lambda one: -one[0])
        ended = [one for one in new_ones[:number] if one[1][-1] == EOS or size == new]
        kept += [(score / size**beams.length_penalty, ids) for score, ids in ended]
        kept = sorted(kept, key=lambda one: -one[0])[:number]
        running = [one for one in new_ones if one[1][-1] != EOS][:number]
        if len(kept) < number:
            continue
        farthest = beams.early_stopping == "never" and beams.length_penalty > 0
        length = new if farthest else size
        possible = running[0][0] / length**beams.length_penalty
        if beams.early_stopping is True or possible <= kept[-1][0]:
            break
    return [token for token in kept[0][1][1:] if token != EOS]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 1.0, 2.0])
def test_rows_are_searched_one_by_one(penalty, early_stopping):
    table = random_table(9, scale=2.0)
    table[:, EOS] += 2.5
    beams = Beams(number=3, length_penalty=penalty, early_stopping=early_stopping)
    starts = range(1, 9)
    expected = [plain_search(log_chances(table), s, 7, beams) for s in starts]
    assert found(table, starts, beams, 7) == expected
    assert min(map(len, expected)) < 7 or penalty == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 1}, "2 beams or more, not 1"),
        ({"length_penalty": float("inf")}, "length_penalty must be a finite number"),
        ({"early_stopping": "soon"}, "True, False or 'never', not 'soon'"),
    ],
)
def test_searches_that_are_none_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Beams(**{"number": 2} | change)
