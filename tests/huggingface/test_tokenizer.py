"""Tokenizers are read from the files a model comes with, and saved as it had them."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from tests.helpers.demo_runs import ASSETS
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.tokenizer import load_tokenizer, save_tokenizer

SENTENCES = ["the cat sat on the mat", "a dog ran over the hill", "hello world"] * 30


def train_sentencepiece(prefix, **settings):
    """Train a small model; return it as sentencepiece reads it."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded("world hello")["input_ids"] == [3, 2]
    assert loaded.eos_token_id == 1


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} has no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(InputError, match=rf"tokenizer in {tmp_path}") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_vocab_txt_alone(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded("The cats sat")["input_ids"] == [2, 5, 6, 7, 8, 3]
    assert loaded.pad_token_id == 0


def test_an_spm_model_alone_as_deberta_v3_has_it(tmp_path):
    theirs = train_sentencepiece(
        tmp_path / "spm",
        vocab_size=60,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"vocab_type": "spm"}')
    loaded = load_tokenizer(tmp_path)
    for text in ("the cat sat", "hello dog"):
        assert loaded(text)["input_ids"] == [1, *theirs.encode(text), 2]


def test_a_tokenizer_model_alone_as_llama_2_has_it(tmp_path):
    theirs = train_sentencepiece(
        tmp_path / "tokenizer",
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
    )
    loaded = load_tokenizer(tmp_path)
    for text in ("the cat sat", "hello, dog!"):
        assert loaded(text)["input_ids"] == [1, *theirs.encode(text)]


def test_code_of_a_folder_is_refused(tmp_path, capsys):
    """transformers asks on the terminal whether to run it."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "own.py").write_text("raise SystemExit(3)")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    with pytest.raises(InputError, match="asks for code of its own") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().out


FIELDS = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "model_max_length": 77,
    "chat_template": "{{ messages[0].content }}",
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
}


def test_a_saved_tokenizer_keeps_the_fields_of_its_base(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "tokenizer.json").write_bytes(
        (ASSETS / "model/tokenizer.json").read_bytes()
    )
    (base / "tokenizer_config.json").write_text(json.dumps(FIELDS))
    # As loaded from it, but for its class: what is saved is the same.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens(["<street>"])
    save_tokenizer(tokenizer, base, out)
    written = json.loads((out / "tokenizer_config.json").read_text())
    decoder = written.pop("added_tokens_decoder")
    assert decoder["1"]["content"] == "<s>"
    assert decoder[str(len(tokenizer) - 1)]["content"] == "<street>"
    kept = {k: v for k, v in FIELDS.items() if k in written}
    assert {k: written[k] for k in kept} == kept
    assert FIELDS.keys() - kept.keys() == {"chat_template", "added_tokens_decoder"}
    assert (out / "chat_template.jinja").read_text() == FIELDS["chat_template"]
    assert not {"backend", "is_local", "name_or_path"} & written.keys()
    loaded = load_tokenizer(out)
    text = "the <street> ends"
    assert loaded.tokenize(text) == tokenizer.tokenize(text)


def test_a_class_of_transformers_5_alone_becomes_the_generic_one(tmp_path):
    base = ASSETS / "model"
    tokenizer = load_tokenizer(base)
    assert "Backend" in (base / "tokenizer_config.json").read_text()
    tokenizer.add_tokens(["<street>"])
    save_tokenizer(tokenizer, base, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "<street> a b"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
