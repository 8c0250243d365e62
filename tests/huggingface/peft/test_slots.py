from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.slots import check_tied, full_tensors

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)
SLOTS = {EMBEDDING: ("embed_tokens/embedding", None), HEAD: ("lm_head/kernel", None)}
PARAMS = {"embed_tokens": {"embedding": TABLE}, "lm_head": {"kernel": TABLE.T + 1}}


def files(tensors, **config):
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    return AdapterFiles(Path("adapter"), config, named)


def test_copies_are_compared_with_the_parameters():
    copies = files({EMBEDDING: TABLE, "lm_head.base_layer.weight": TABLE + 1})
    assert full_tensors(copies, SLOTS, PARAMS) == {}
    with pytest.raises(InputError, match="give tensor_paths and params"):
        full_tensors(copies, SLOTS, None)
    grown = files({HEAD: np.concatenate([TABLE, TABLE])})
    with pytest.raises(InputError, match=r"with 8 rows, .* has 4: grow it first"):
        full_tensors(grown, SLOTS, PARAMS)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_what_trains_apart_is_refused_of_a_tied_model(name):
    tied = {EMBEDDING: SLOTS[EMBEDDING]}
    module = name.removesuffix(".weight").rpartition(".")[2]
    found = files({name: TABLE}, modules_to_save=[module])
    full = full_tensors(found, tied, None)
    with pytest.raises(InputError, match="ensure_weight_tying=True"):
        check_tied(found, full, tied)
    check_tied(found, full, SLOTS)
