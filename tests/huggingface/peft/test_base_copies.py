from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.base_copies import base_copies, full_on_base
from tsd_jax.huggingface.peft.files import AdapterFiles

PREFIX = "base_model.model."
BASE = np.arange(12, dtype=np.float32).reshape(4, 3)
GROWN = np.concatenate([BASE, BASE[:2] + 50])


def files(tensors, **config):
    named = {PREFIX + name: value for name, value in tensors.items()}
    return AdapterFiles(Path("adapter"), config, named)


@pytest.mark.parametrize("inside", ["base_layer", "token_adapter.base_layer"])
def test_a_copy_that_equals_the_base_is_dropped(inside):
    found = files({f"lm_head.{inside}.weight": BASE})
    assert base_copies(found).keys() == {HEAD}
    assert full_on_base(found, lambda name: BASE, tied=False) == {}


def test_an_encoders_table_is_a_copy():
    words = "bert.embeddings.word_embeddings.weight"
    assert base_copies(files({words: BASE})).keys() == {words}
    assert full_on_base(files({words: BASE}), lambda name: BASE, tied=False) == {}


def test_new_rows_of_a_copy_are_grown_rows():
    found = full_on_base(files({HEAD: GROWN}), lambda name: BASE, tied=False)
    assert found[HEAD].rows == (4, 5)
    np.testing.assert_array_equal(found[HEAD].value, BASE[:2] + 50)


def test_trained_rows_lie_over_those_of_a_copy():
    tensors = {
        "model.embed_tokens.token_adapter.base_layer.weight": GROWN,
        "model.embed_tokens.token_adapter.trainable_tokens_delta": BASE[2:3] - 9,
    }
    config = {"trainable_token_indices": {"embed_tokens": [5]}}
    found = full_on_base(files(tensors, **config), lambda name: BASE, tied=False)
    assert found[EMBEDDING].rows == (4, 5)
    expected = np.stack([GROWN[4], BASE[2] - 9])
    np.testing.assert_array_equal(found[EMBEDDING].value, expected)


def test_copies_of_another_base_are_refused():
    for stored in (None, BASE[:, :2], GROWN):
        with pytest.raises(InputError, match="give the base that was trained on"):
            full_on_base(files({HEAD: BASE}), lambda name, x=stored: x, tied=False)
    both = {"lm_head.base_layer.weight": BASE, HEAD: BASE + 1}
    with pytest.raises(InputError, match="twice, with different values"):
        base_copies(files(both))
