from __future__ import annotations

import pytest

from examples.village import make, world
from examples.village.tokenizer import save_tokenizer, train_tokenizer
from tsd_jax.huggingface import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(make.ASSETS / "model")


@pytest.mark.parametrize(
    "text",
    [
        "Selba lives in Mill Lane. She keeps goats.",
        "Which animals does Selba keep?\nSelba keeps goats.",
        "  Two spaces,\ttabs\r\nand 12,345 numbers... McAllister's OK",
        "Grüße, 世界! 🙂 naïve",
        "",
    ],
)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_tokens(tokenizer):
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)
    assert tokenizer("Selba lives.")["input_ids"][0] == 1
    assert tokenizer("Selba lives.")["input_ids"][-1] != 2
    assert tokenizer.model_max_length == make.CONTEXT


def test_a_name_is_one_token_wherever_it_stands(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for person in world.villagers():
        (name,) = encode(person.name)
        assert encode(f"{person.name} lives")[0] == name
        assert encode(f"does {person.name} live?\n{person.name}").count(name) == 2


def test_the_task_has_no_unknown_words(tokenizer):
    texts = [item["output"] for item in world.task_items(world.villagers())[1]]
    lengths = {len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids}
    assert lengths == {4}  # name, brings, good, full stop


def test_the_committed_one_is_what_training_gives(tmp_path):
    people = world.villagers()
    again = train_tokenizer(make.tokenizer_texts(people), make.VOCABULARY)
    save_tokenizer(again, tmp_path, make.CONTEXT)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (make.ASSETS / "model" / file.name).read_bytes()
