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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the version, and {name: (tokenizer, ids of the texts in version 4)}."""
    root, grown = tmp_path_factory.mktemp("tokenizers"), {}
    for name, make in MAKERS.items():
        base = root / f"{name} base"
        make().save_pretrained(base)
        grown[name] = load_tokenizer(base)
        grown[name].add_tokens(["<new>"])
        save_tokenizer(grown[name], base, root / name)
    folders = [str(root / name) for name in MAKERS]
    texts = json.dumps(TEXTS)
    printed = run_aside("transformers4", "tests.helpers.tokenizers4", texts, *folders)
    version, *ids = json.loads(printed.splitlines()[-1])
    pairs = zip(grown.values(), ids, strict=True)
    return version, dict(zip(MAKERS, pairs, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_ids_are_the_same_in_version_4(found, name):
    version, of_all = found
    tokenizer, ids = of_all[name]
    assert version.startswith("4.57.")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert ids == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len(tokenizer) - 1 in ids[1]
