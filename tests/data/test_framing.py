"""What stands around a text is what the tokenizer itself puts there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tsd_jax.core.errors import InputError
from tsd_jax.data.encoding import encode_choices, encode_examples, encode_prompts
from tsd_jax.data.framing import BoundedTokenizer, Frame, begin, frame_of, keep_end
from tsd_jax.data.sources import Record
from tsd_jax.data.templates import plain

WORDS = ["<pad>", "<s>", "</s>", "<x>", "a", "b", "c", "d", "e", "f"]
PAD, BOS, EOS, X, A, B, C, D = range(8)


def words(single: str | None, **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word; `single` is its post-processor."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single is not None:
        special = [(word, n) for n, word in enumerate(WORDS[:4])]
        backend.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
# {tokenizers of this kind: (one of them, the tokens in front)}.
KINDS = {
    "Llama 2 and 3, Mistral, Gemma": (words("<s> $A", **BOTH), (BOS,)),
    "Qwen2.5": (words(None, eos_token="</s>"), ()),
    "SmolLM2, GPT-2": (words(None, **BOTH), ()),
    "adds EOS too": (words("<s> $A </s>", **BOTH), (BOS,)),
    "T5": (words("$A </s>", eos_token="</s>", pad_token="<pad>"), ()),
    "two in front": (words("<x> <s> $A", **BOTH), (X, BOS)),
    "pads with EOS": (words("<s> $A", **BOTH, pad_token="</s>"), (BOS,)),
}


@pytest.mark.parametrize(("tokenizer", "front"), KINDS.values(), ids=KINDS)
def test_the_front_is_the_tokenizer_s_own(tokenizer, front):
    assert frame_of(tokenizer) == Frame(front, (EOS,))
    records = [Record("a", "", "c d", "d", ("d", "c"))]
    arrays = encode_examples(records, tokenizer, plain, 8).arrays
    ids = [*front, A, C, D, EOS]
    padded = np.zeros((2, 8), np.int32)
    padded[0, : len(ids) - 1], padded[1, : len(ids) - 1] = ids[:-1], ids[1:]
    np.testing.assert_array_equal(arrays["tokens"], padded[:1])
    np.testing.assert_array_equal(arrays["targets"], padded[1:])
    # EOS is learned, whatever pads.
    start = len(front)
    np.testing.assert_array_equal(
        np.flatnonzero(arrays["weights"][0]), [start, start + 1, start + 2]
    )
    choices = encode_choices(records, tokenizer, plain, 8).arrays["tokens"]
    np.testing.assert_array_equal(choices[:, : len(front) + 2], [[*front, A, C]] * 2)
    prompts = encode_prompts(records, tokenizer, plain)
    np.testing.assert_array_equal(prompts.tokens, [[*front, A]])


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_is_followed(adds):
    tokenizer: Any = LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5},
        merges=[],
        add_bos_token=adds,
    )
    assert frame_of(tokenizer) == Frame((1,) if adds else (), (2,))


def test_a_prompt_that_has_the_front_keeps_one():
    frame = Frame((X, BOS), (EOS,))
    assert begin([X, BOS, A], frame) == [X, BOS, A]
    assert begin([BOS, A], frame) == [X, BOS, BOS, A]
    tokenizer, _ = KINDS["Llama 2 and 3, Mistral, Gemma"]
    prompts = encode_prompts([Record("<s> a", "", "b")], tokenizer, plain)
    np.testing.assert_array_equal(prompts.tokens, [[BOS, A]])


def test_the_front_stays_where_a_prompt_is_cut():
    ids = [BOS, A, B, C, D]
    assert keep_end(ids, 5, Frame((BOS,), ())) == ids
    assert keep_end(ids, 3, Frame((BOS,), ())) == [BOS, C, D]
    assert keep_end(ids, 3, Frame((), ())) == [B, C, D]
    assert keep_end(ids, 1, Frame((BOS, A), ())) == [BOS]
    assert keep_end(ids, 2, Frame((BOS, A), ())) == [BOS, A]
    assert keep_end(ids, 0, Frame((BOS,), ())) == []


def test_a_tokenizer_that_writes_otherwise_is_refused():
    class Odd(SimpleNamespace):
        def __call__(self, text, add_special_tokens, **kwargs):
            return {"input_ids": [[1, 5] if add_special_tokens else [4]]}

    odd: Any = Odd(eos_token_id=2)
    with pytest.raises(InputError, match=r"into \[1, 5\] with special tokens and into"):
        frame_of(odd)


def test_ids_without_a_row_are_refused_by_name():
    tokenizer = KINDS["Llama 2 and 3, Mistral, Gemma"][0]
    bounded = BoundedTokenizer(tokenizer, D + 1)
    assert bounded(["a d"])["input_ids"] == [[BOS, A, D]]
    assert bounded.eos_token == "</s>"
    pairs = ["a", "b"], ["c", "d"]
    assert bounded(*pairs) == tokenizer(*pairs)
    with pytest.raises(
        InputError, match=r"token 'f' has id 9, and .* embedding 8 rows"
    ):
        bounded(["a b", "c f"])
    with pytest.raises(InputError, match="token '</s>' has id 2"):
        BoundedTokenizer(tokenizer, EOS)
