from __future__ import annotations

import dataclasses
import json

import pytest
from safetensors import safe_open

from tests.helpers.small_llama import CONFIG
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.save import write_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path, params):
    write_checkpoint(tmp_path, CONFIG, params)
    return tmp_path


def test_more_entries_go_into_the_config(tmp_path, params):
    new = tmp_path / "not" / "yet"
    write_checkpoint(new, CONFIG, params, extra={"eos_token_id": [2, 7]})
    content = json.loads((new / "config.json").read_text())
    assert content["eos_token_id"] == [2, 7]
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert sorted(file.name for file in new.iterdir()) == ["config.json", WEIGHTS]
    with safe_open(new / WEIGHTS, framework="np") as opened:
        # Older transformers insist on it.
        assert opened.metadata() == {"format": "pt"}


def test_both_files_may_be_read_by_the_same_people(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_a_tree_that_does_not_fit_leaves_the_folder_as_it_was(folder, params):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(InputError, match="lm_head/kernel"):
        write_checkpoint(
            folder, dataclasses.replace(CONFIG, tie_word_embeddings=True), params
        )
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
