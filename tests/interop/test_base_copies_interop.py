"""Adapters that stock PEFT saves with copies of the base's embedding or head."""

from __future__ import annotations

import json
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from tests.interop.test_tied_interop import (
    VOCABULARY,
    bases,  # noqa: F401  a fixture
    forward,  # noqa: F401  a fixture
    stock,
)
from tsd_jax.binding.linen import make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import (
    grow,
    grown_config,
    load_params,
    module_paths,
    read_config,
    tensor_paths,
)
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.merge import merge_peft
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

NEW = 2
GROWN = (VOCABULARY, VOCABULARY + NEW)
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(2, 12))
TOKENS[:, ::4] = 5, *GROWN[:1], GROWN[1] - 1

CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LoRA of the head": (False, {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA of the embedding": (False, {"target_modules": ["q_proj", "embed_tokens"]}),
    "resized": (True, {}),
    "resized, both": (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized, embedding": (True, {"modules_to_save": ["embed_tokens"]}),
    "resized, tied embedding": (
        True,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "resized, rows": (True, {"trainable_token_indices": {"embed_tokens": [64, 65]}}),
}
_APART = ("resized, both", "resized, embedding")


def logits_of(model, grows: bool) -> np.ndarray:
    tokens = TOKENS if grows else TOKENS % VOCABULARY
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def resized(base, grows: bool):
    model = stock(base)
    if grows:
        model.resize_token_embeddings(VOCABULARY + NEW)
    return model


@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_copies_of_the_base_are_dropped_or_grow_it(bases, tmp_path, case, base):  # noqa: F811
    grows, settings = CASES[case]
    settings = {"target_modules": ["q_proj"], **json.loads(json.dumps(settings))}
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(1)
    model = peft.get_peft_model(resized(bases[base], grows), config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.requires_grad:
                leaf.add_(0.2 * torch.randn(leaf.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
        again = resized(bases[base], grows)
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    theirs = logits_of(again, grows)
    np.testing.assert_allclose(theirs, logits_of(model, grows), atol=1e-5)

    files, out = read_files(tmp_path / "adapter"), tmp_path / "merged"
    merge_peft(out, files, base_folder=bases[base])
    merged = stock(out)
    assert merged.config.vocab_size == VOCABULARY + NEW * grows
    np.testing.assert_allclose(logits_of(merged, grows), theirs, atol=3e-4)
    if "LoRA" in case or (base == "tied" and case in _APART):
        return
    found_config = read_config(bases[base])
    params = load_params(bases[base], found_config)
    if grows:
        found_config, params = grown_config(found_config, GROWN), grow(params, GROWN)
    decoder, variables = Decoder(found_config), {"params": params}
    slots = module_paths(params, "llama"), tensor_paths(params, "llama")
    found = from_peft(tmp_path / "adapter", *slots, params)
    spec = make_spec(decoder.apply, variables, found.rules(), TOKENS, method="lora")
    trees = found.start(jax.random.key(0), spec, params=params)
    ours = decoder.apply({"params": merge(params, *trees)}, TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=3e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_of_which_peft_saves_the_head_alone_is_refused(bases, tmp_path):  # noqa: F811
    """Its new rows of the embedding are lost in PEFT's own file."""
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(resized(bases["untied"], True), config)
    model.save_pretrained(tmp_path / "adapter")
    files = read_files(tmp_path / "adapter")
    with pytest.raises(InputError, match="would have 64 and 66 rows in"):
        merge_peft(tmp_path / "out", files, base_folder=bases["untied"])
