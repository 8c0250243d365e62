from __future__ import annotations

import json

import pytest

from examples.village import make, world
from tsd_jax import huggingface


@pytest.fixture(scope="module")
def figures():
    return make.check(make.ASSETS, world.villagers())


@pytest.mark.slow
@pytest.mark.parametrize("fact", [fact.field for fact in world.FACTS])
def test_the_committed_model_knows_its_world(figures, fact):
    assert figures[fact] >= 0.95  # chance: 0.125


@pytest.mark.slow
def test_the_committed_model_only_guesses_at_the_task(figures):
    assert 0.15 <= figures["task"] <= 0.35  # chance: 0.25


def test_the_committed_config_is_the_one_made():
    folder = make.ASSETS / "model"
    tokenizer = huggingface.load_tokenizer(folder)
    assert huggingface.read_config(folder) == make.make_config(len(tokenizer))
    for name in ("config.json", "generation_config.json"):
        stored = json.loads((folder / name).read_text(encoding="utf-8"))
        special = (stored["bos_token_id"], stored["eos_token_id"])
        assert special == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_documents_fit_their_rows_and_end():
    people = world.villagers()
    tokenizer = huggingface.load_tokenizer(make.ASSETS / "model")
    stream = make.token_ids(tokenizer, people)
    count = len(world.documents(people, 0))
    first = [next(stream) for _ in range(count)]
    assert max(map(len, first)) <= make.SCHEDULE.length
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in first)
    assert [next(stream) for _ in range(count)] != first  # worded anew
