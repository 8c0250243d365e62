from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.full_params import full_of, is_full

PREFIX = "base_model.model."
ROWS = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)


def full(tensors: dict[str, np.ndarray], **config: Any):
    files = AdapterFiles(Path("adapter"), config, tensors)
    return {n: (each.value.tolist(), each.rows) for n, each in full_of(files).items()}


def test_saved_modules_hold_all_their_tensors():
    names = ("model.norm.weight", "model.norm.bias", "model.q.lora_A.weight")
    tensors = {PREFIX + name: VALUE for name in names}
    found = full(tensors, modules_to_save=["norm"])
    assert found == {name: (VALUE.tolist(), None) for name in names[:2]}
    assert full(tensors) == {}
    config = {"modules_to_save": ["norm"]}
    assert [is_full(name, config) for name in tensors] == [True, True, False]


@pytest.mark.parametrize("indices", [[4, 7], {"embed_tokens": [4, 7]}])
def test_rows_have_the_numbers_of_the_config(indices):
    found = full({ROWS: VALUE}, trainable_token_indices=indices)
    assert found == {TABLE: (VALUE.tolist(), (4, 7))}


def test_the_copy_of_a_tied_embedding_is_left_out():
    tensors = {PREFIX + TABLE: VALUE, PREFIX + HEAD: VALUE}
    config = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert full(tensors, **config).keys() == {TABLE}
    tensors[PREFIX + HEAD] = VALUE + 1
    assert full(tensors, **config).keys() == {TABLE, HEAD}


def test_a_head_is_a_copy_where_its_embedding_does_not_train():
    tensors = {PREFIX + HEAD: VALUE, f"{PREFIX}model.norm.weight": VALUE}
    found = full(tensors, modules_to_save=["norm"], ensure_weight_tying=True)
    assert found.keys() == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({}, {"modules_to_save": ["norm"]}, "none of what modules_to_save"),
        ({}, {"trainable_token_indices": [1]}, "none of what trainable_token_indices"),
        ({ROWS: VALUE}, {"trainable_token_indices": [1]}, "names 1 of them"),
        ({ROWS: VALUE}, {"trainable_token_indices": {"x": [1]}}, "names 0 of them"),
    ],
)
def test_config_and_tensors_must_agree(tensors, config, told):
    with pytest.raises(InputError, match=told):
        full(tensors, **config)
