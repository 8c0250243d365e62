"""What is saved with added tokens gives the same ids in transformers 4."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from tests.helpers.aside import run_aside
from tests.helpers.demo_runs import ASSETS
from tsd_jax.huggingface.tokenizer import load_tokenizer, save_tokenizer

TEXTS = ("the street", "a <new> street", "x\n<new>")
BYTES = sorted(
    json.loads((ASSETS / "model/tokenizer.json").read_text())["model"]["vocab"].items(),
    key=lambda item: item[1],
)[:300]
MAKERS = {
    "demo": lambda: load_tokenizer(ASSETS / "model"),
    "Llama": lambda: LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "t": 4, "h": 5, "e": 6},
        merges=[],
    ),
    "Qwen": lambda: Qwen2Tokenizer(vocab=dict(BYTES), merges=[]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_ids_are_the_same_in_version_4(make, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    make().save_pretrained(base)
    tokenizer = load_tokenizer(base)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_tokens(["<new>"])
    save_tokenizer(tokenizer, base, out)
    printed = run_aside("transformers4", "tests.helpers.tokenizers4", str(out), *TEXTS)
    version, *ids = json.loads(printed.splitlines()[-1])
    assert version.startswith("4.57.")
    assert ids == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(tokenizer) - 1 in ids[1]
