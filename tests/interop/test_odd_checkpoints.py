"""Checkpoints that stock transformers loads although their files are unusual."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from tsd_jax import huggingface
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
from tests.helpers.stock import torch_logits

TOKENS = np.random.default_rng(0).integers(61, size=(2, 9))
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def renamed(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the tensors; leave out those renamed to None."""
    tensors = load_file(folder / WEIGHTS)
    new = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({k: v for k, v in new.items() if k}, folder / WEIGHTS, {"format": "pt"})


def listed(folder: Path, path: str, **more: str) -> None:
    """Put the weights at a path, and an index beside config.json."""
    names = load_file(folder / WEIGHTS)
    target = folder / path
    target.parent.mkdir(exist_ok=True)
    (folder / WEIGHTS).rename(target)
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, path) | more}
    (folder / INDEX).write_text(json.dumps(content))


SHARD = "model-00001-of-00001.safetensors"
# {what is odd: (whether the head is tied, what makes it so)}.
ODD: dict[str, tuple[bool, Callable[[Path], None]]] = {
    "an index with ./": (False, lambda f: listed(f, f"./{SHARD}")),
    "an index with a folder": (False, lambda f: listed(f, f"sub/{SHARD}")),
    "a tied head that no shard has": (
        True,
        lambda f: listed(f, SHARD, **{"lm_head.weight": SHARD}),
    ),
    "flat names": (True, lambda f: renamed(f, lambda n: n.removeprefix("model."))),
    "a tied head stored as well": (
        True,
        lambda f: save_file(
            (t := load_file(f / WEIGHTS))
            | {"lm_head.weight": t["model.embed_tokens.weight"]},
            f / WEIGHTS,
            {"format": "pt"},
        ),
    ),
}


@pytest.mark.parametrize(("tied", "make"), ODD.values(), ids=ODD)
def test_logits_are_those_of_transformers(tmp_path, tied, make):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    make(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = huggingface.read_config(tmp_path)
    huggingface.check_checkpoint(tmp_path, ours)
    params = huggingface.load_params(tmp_path, ours)
    found = jax.jit(Decoder(ours).apply)({"params": params}, TOKENS)
    expected = torch_logits(stock.float().eval(), TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    assert np.abs(expected).max() > 0.5
