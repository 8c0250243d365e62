from __future__ import annotations

import numpy as np
import pytest

from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.merge_tied import (
    Change,
    changes_of,
    is_tied,
    tied_changes,
)
from tsd_jax.huggingface.names import EMBEDDING, HEAD

ROWS, WIDTH = 5, 3
RNG = np.random.default_rng(0)


def full(module: str, *rows: int, seed: int = 0) -> FullTensor:
    value = np.random.default_rng(seed).normal(size=(len(rows) or ROWS, WIDTH))
    return FullTensor(module, "weight", value.astype(np.float32), rows or None)


PAIR = Factors(*(RNG.normal(size=s).astype("float32") for s in [(3, 2), (2, 5)]))
TABLE, TABLE_ROWS = full("model.embed_tokens"), full("model.embed_tokens", 1, 3)


def test_values_are_replaced_before_a_product_is_added():
    stored = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
    change = changes_of({"lm_head": PAIR}, {HEAD: full("lm_head", 1, 3)})[HEAD]
    expected = stored.copy()
    expected[[1, 3]] = full("lm_head", 1, 3).value
    expected += (PAIR.down @ PAIR.up).T
    np.testing.assert_allclose(change.applied(stored), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "follows", "untied", "changed"),
    [
        ({}, False, False, set()),
        ({EMBEDDING: Change(TABLE)}, True, False, {EMBEDDING, HEAD}),
        ({EMBEDDING: Change(TABLE)}, False, True, {EMBEDDING}),
        ({HEAD: Change(factors=PAIR)}, True, True, {HEAD}),
        (
            {EMBEDDING: Change(TABLE), HEAD: Change(full("lm_head", seed=1))},
            True,
            True,
            {EMBEDDING, HEAD},
        ),
        # The same values: one matrix still.
        (
            {EMBEDDING: Change(TABLE), HEAD: Change(full("lm_head"))},
            False,
            False,
            {EMBEDDING, HEAD},
        ),
        (
            {EMBEDDING: Change(TABLE_ROWS), HEAD: Change(full("lm_head", 1, 2))},
            False,
            True,
            {EMBEDDING, HEAD},
        ),
    ],
)
def test_a_head_is_untied_where_it_is_another_matrix(changes, follows, untied, changed):
    found = tied_changes(changes, {EMBEDDING, HEAD}, head_follows=follows)
    assert found.untied == untied
    assert found.changes.keys() == changed
    alone = tied_changes(changes, {EMBEDDING}, head_follows=follows)
    assert alone.untied == untied
    assert (HEAD in alone.changes) == (untied and HEAD in changed)


def test_a_head_with_a_product_has_the_rows_of_its_embedding():
    changes = {EMBEDDING: Change(TABLE_ROWS), HEAD: Change(factors=PAIR)}
    found = tied_changes(changes, {EMBEDDING}, head_follows=True)
    assert found.changes[HEAD] == Change(TABLE_ROWS, PAIR)


def test_tying_is_the_family_default_where_the_config_is_silent():
    assert is_tied({"model_type": "gemma2"})
    assert not is_tied({"model_type": "gemma2", "tie_word_embeddings": False})
    assert not is_tied({"model_type": "llama"})
    assert not is_tied({})
    assert is_tied({"tie_word_embeddings": True})
