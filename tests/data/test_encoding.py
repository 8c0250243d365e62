from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.data.encoding import (
    encode_choices,
    encode_examples,
    encode_prompts,
    encode_text,
    split_text,
    windows,
)
from tsd_jax.data.sources import Record, read_text
from tsd_jax.data.templates import plain

BOS, EOS = 1, 2


@dataclass
class Letters:
    """A tokenizer of one token per character: a is 10, b is 11, ..., newline is 3."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS

    def __call__(self, text: Any, **kwargs: Any) -> dict[str, Any]:
        assert kwargs.keys() == {"add_special_tokens", "verbose"}
        assert not kwargs["verbose"]
        adds = kwargs["add_special_tokens"] and self.bos_token_id is not None
        front = [self.bos_token_id] if adds else []
        return {"input_ids": [front + [self.token(c) for c in one] for one in text]}

    @staticmethod
    def token(character: str) -> int:
        return {"\n": 3, "<": BOS}.get(character, ord(character) - ord("a") + 10)


def record(prompt: str, output: str, **kwargs: Any) -> Record:
    return Record(prompt, "", output, **kwargs)


def test_rows_are_shifted_padded_and_weighted():
    encoded = encode_examples([record("ab", "cd")], Letters(), plain, 8)
    np.testing.assert_array_equal(
        encoded.arrays["tokens"], [[BOS, 10, 11, 3, 12, 13, 0, 0]]
    )
    np.testing.assert_array_equal(
        encoded.arrays["targets"], [[10, 11, 3, 12, 13, EOS, 0, 0]]
    )
    np.testing.assert_array_equal(encoded.arrays["weights"], [[0, 0, 0, 1, 1, 1, 0, 0]])
    dtypes = {name: array.dtype.name for name, array in encoded.arrays.items()}
    assert dtypes == {"tokens": "int32", "targets": "int32", "weights": "float32"}
    assert (encoded.truncated, encoded.dropped) == (0, 0)


def test_train_on_prompt_weighs_all_but_the_padding():
    encoded = encode_examples(
        [record("ab", "cd")], Letters(), plain, 8, train_on_prompt=True
    )
    np.testing.assert_array_equal(encoded.arrays["weights"], [[1] * 6 + [0] * 2])


def test_bos_is_not_doubled_nor_invented():
    tokens = [
        encode_examples([record(p, "c")], t, plain, 5).arrays["tokens"][0].tolist()
        for p, t in [("<a", Letters()), ("a", Letters()), ("a", Letters(None))]
    ]
    assert tokens == [[BOS, 10, 3, 12, 0], [BOS, 10, 3, 12, 0], [10, 3, 12, 0, 0]]


def test_truncated_and_dropped_rows_are_counted():
    # BOS + prompt + newline: 3, 3, 6 and 7 tokens, in front of "xyz" and EOS.
    records = [record(p, "xyz") for p in ("a", "b", "abcd", "abcde")]
    encoded = encode_examples(records, Letters(), plain, 6)
    assert encoded.rows.tolist() == [0, 1, 2]
    assert (encoded.truncated, encoded.dropped) == (1, 1)
    # All 7 ids of the first fit; of the third only the target's first.
    assert encoded.arrays["targets"][0].tolist() == [10, 3, 33, 34, 35, EOS]
    assert encoded.arrays["weights"].sum(1).tolist() == [4, 4, 1]
    assert encoded.arrays["targets"][2][-1] == 33


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match=r"2 records .* within length 3; raise"):
        encode_examples([record("abc", "x")] * 2, Letters(), plain, 3)
    with pytest.raises(InputError, match="no EOS token"):
        encode_examples([record("a", "x")], Letters(eos_token_id=None), plain, 8)
    with pytest.raises(InputError, match="length is 0"):
        encode_examples([record("a", "x")], Letters(), plain, 0)


def test_choices_write_each_option_in_the_place_of_the_answer():
    records = [
        record("a", "itisb", answer="b", options=("b", "cd")),
        record("abc", "yes", answer="no", options=("x", "no", "z")),
    ]
    choices = encode_choices(records, Letters(), plain, 9)
    assert choices.groups.tolist() == [0, 0, 1, 1, 1]
    assert choices.labels.tolist() == [0, 1]
    assert choices.truncated == 0
    marked = [
        targets[weights == 1].tolist()
        for targets, weights in zip(
            choices.arrays["targets"], choices.arrays["weights"], strict=True
        )
    ]
    texts = ["itisb", "itiscd", "x", "no", "z"]
    assert marked == [[Letters.token(c) for c in text] for text in texts]
    assert choices.arrays["tokens"][1].tolist() == [BOS, 10, 3, 18, 29, 18, 28, 12, 0]


def test_choices_keep_the_option_and_cut_the_prompt():
    records = [record("abcd", "x", answer="x", options=("x", "yz"))]
    choices = encode_choices(records, Letters(), plain, 4)
    assert choices.truncated == 1
    np.testing.assert_array_equal(
        choices.arrays["tokens"], [[BOS, 12, 13, 3], [BOS, 13, 3, 34]]
    )
    np.testing.assert_array_equal(
        choices.arrays["weights"], [[0, 0, 0, 1], [0, 0, 1, 1]]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "x"}, "record 1 has 0 options"),
        ({"answer": "x", "options": ("y", "z")}, "answer 'x' is not among .* y, z"),
        ({"answer": "x", "options": ("x", "abcdef")}, "'abcdef' has 6 tokens"),
    ],
)
def test_bad_choices(fields, message):
    with pytest.raises(InputError, match=message):
        encode_choices([record("a", "x", **fields)], Letters(), plain, 4)


def test_prompts_are_padded_on_the_left_and_cut_behind_bos():
    records = [record("a", "x"), record("abcd", "x")]
    prompts = encode_prompts(records, Letters(), plain)
    np.testing.assert_array_equal(
        prompts.tokens, [[0, 0, 0, BOS, 10, 3], [BOS, 10, 11, 12, 13, 3]]
    )
    np.testing.assert_array_equal(prompts.mask, [[0, 0, 0, 1, 1, 1], [1] * 6])
    assert prompts.truncated == 0
    short = encode_prompts(records, Letters(), plain, 4)
    np.testing.assert_array_equal(short.tokens, [[0, BOS, 10, 3], [BOS, 12, 13, 3]])
    assert short.truncated == 1
    with pytest.raises(InputError, match="no prompts"):
        encode_prompts([], Letters(), plain)


@pytest.mark.parametrize("count", [9, 10, 11, 12])
def test_windows_predict_every_id_but_the_first_once(count):
    ids = np.arange(100, 100 + count)
    batch = windows(ids, 3)
    whole = (count - 1) // 3
    assert batch["tokens"].shape == batch["weights"].shape == (whole, 3)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"].ravel(), 101 + np.arange(whole * 3))
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["weights"].all()


def test_too_little_text_for_a_window():
    with pytest.raises(InputError, match="3 tokens, too few for one window of 3"):
        windows(np.arange(3), 3)


def test_split_text():
    assert split_text("abcdefghij", 0.1) == ("abcdefghi", "j")
    assert split_text("abcdefghij", 0.25) == ("abcdefgh", "ij")
    for text, fraction in [("abc", 1.0), ("abc", 0.0), ("abc", 0.01), ("", 0.5)]:
        with pytest.raises(InputError, match=r"(hold|held)[ -]out"):
            split_text(text, fraction)


def test_text_ids():
    ids = encode_text("ab\n", Letters())
    np.testing.assert_array_equal(ids, [10, 11, 3])
    assert ids.dtype == np.int32


@pytest.mark.shared
def test_a_real_tokenizer_and_real_text(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories3M")
    text = read_text(shared / "data" / "text" / "tinyshakespeare.txt")
    train, held_out = split_text(text, 0.1)
    assert len(held_out) == round(len(text) / 10)
    assert train + held_out == text
    ids = encode_text(held_out, tokenizer)
    # Byte fallback: nothing is lost. (Decoding puts the space in front that
    # encoding adds.)
    assert tokenizer.decode(ids.tolist()).strip() == held_out.strip()

    encoded = encode_examples(
        [Record("Say hello", "", "hello there")], tokenizer, plain, 16
    )
    weights = encoded.arrays["weights"][0] == 1
    *answer, end = encoded.arrays["targets"][0][weights].tolist()
    assert end == tokenizer.eos_token_id
    assert tokenizer.decode(answer).strip() == "hello there"
    assert encoded.arrays["tokens"][0, 0] == tokenizer.bos_token_id
