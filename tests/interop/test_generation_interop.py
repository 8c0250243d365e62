"""What we generate is what transformers generates: greedily, and with beams."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import transformers

from tests.helpers.decoders import PUBLISHED, write_decoder
from tsd_jax import huggingface
from tsd_jax.evaluation.generation import Generation, generate
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")

PROMPTS = [
    "Once upon a time",
    "Tom",
    "The big red dog was not very happy because",
    "One day, a girl named Sue went to the park and",
]
STRATEGIES = [
    {},
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
]


@functools.cache
def stock(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def theirs(folder, prompts, ends, new, **strategy):
    """Return new tokens up to the end of each row, from a batch padded on the left."""
    length = max(map(len, prompts))
    tokens, mask = np.zeros((2, len(prompts), length), int)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    with torch.no_grad():
        made = stock(folder).generate(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
            **strategy,
        )
    rows = made[:, length:].tolist()
    found = [next((n for n, t in enumerate(r) if t in ends), len(r)) for r in rows]
    return [row[:end] for row, end in zip(rows, found, strict=True)]


@functools.cache
def loaded(folder):
    config = huggingface.read_config(folder)
    return Decoder(config).apply, {"params": huggingface.load_params(folder, config)}


def ours(folder, prompts, ends, new, **strategy):
    settings = Generation(max_new_tokens=new, eos_ids=ends, **strategy)
    return generate(*loaded(folder), prompts, settings)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_texts_of_a_real_model(shared, strategy):
    folder = shared / "models" / "stories3M"
    tokenizer = huggingface.load_tokenizer(folder)
    prompts = tokenizer(PROMPTS)["input_ids"]
    period = tokenizer.convert_tokens_to_ids(".")
    for ends in ((1, 2), (1, 2, period)):
        expected = theirs(folder, prompts, ends, 40, **strategy)
        assert ours(folder, prompts, ends, 40, **strategy) == expected


@pytest.fixture
def smollm2():
    """Return the folder of SmolLM2-135M that the variable SMOLLM2 names, or skip."""
    folder = os.environ.get("SMOLLM2")
    if folder is None:
        pytest.skip("SMOLLM2 names no folder: make one with make_smollm2.py")
    return Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_texts_of_a_language_model(smollm2, beams):
    tokenizer = huggingface.load_tokenizer(smollm2)
    prompts = tokenizer([*PROMPTS, "The capital of France is"])["input_ids"]
    expected = theirs(smollm2, prompts, (0, 2), 24, num_beams=beams)
    assert ours(smollm2, prompts, (0, 2), 24, num_beams=beams) == expected


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2_moe", "mistral"])
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_of_families(tmp_path_factory, family, beams):
    folder = tmp_path_factory.mktemp(family)
    write_decoder(folder, PUBLISHED[family])
    prompts = [[5], [3, 1, 4, 1, 5, 9, 2, 6], [9, 2, 6]]
    expected = theirs(folder, prompts, (2, 7, 8), 12, num_beams=beams)
    assert ours(folder, prompts, (2, 7, 8), 12, num_beams=beams) == expected
