from __future__ import annotations

import json

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import read_eos_ids


def folder_of(tmp_path, config, generation=None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [128009, 128001, 128008]}, 3),
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [5, 2, 5]}, None, (2, 5)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 2}, {"temperature": 0.6}, ()),
        ({}, None, ()),
    ],
)
def test_all_end_tokens_are_read(tmp_path, config, generation, expected):
    found = read_eos_ids(folder_of(tmp_path, config, generation))
    if expected == 3:
        expected = (128001, 128008, 128009)
    assert found == expected


@pytest.mark.parametrize("found", ["</s>", [2, None], True, -1, 2.0])
def test_what_is_no_id_is_refused(tmp_path, found):
    folder = folder_of(tmp_path, {}, {"eos_token_id": found})
    with pytest.raises(InputError, match=r"generation_config.json: eos_token_id is"):
        read_eos_ids(folder)
