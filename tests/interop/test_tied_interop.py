"""Tied heads: what stock PEFT computes is what is merged, and what from_peft starts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from tsd_jax.binding.linen import make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import (
    load_params,
    module_paths,
    read_config,
    tensor_paths,
)
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.merge import merge_peft
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

VOCABULARY = 64
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(2, 12))
TOKENS[:, :4] = [3, 4, 5, 7]
BASES = ("tied", "tied with a stored copy", "untied")

# {what is adapted: settings of PEFT beside its ordinary targets}.
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows of the embedding": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [4, 7]}},
    "other rows of both": {
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4, 7]}
    },
    "the same rows of both": {
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}
    },
    "LoRA of the embedding": {"target_modules": ["embed_tokens"]},
    "LoRA of the head": {"target_modules": ["lm_head"]},
    "LoRA of both": {"target_modules": ["embed_tokens", "lm_head"]},
    "LoRA of the head, embedding": {
        "target_modules": ["lm_head"],
        "modules_to_save": ["embed_tokens"],
    },
    "LoRA of the head, rows of the embedding": {
        "target_modules": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [3, 5]},
    },
}
_ROWS_APART = {"rows of the head", "other rows of both"}
CASES = [
    (kind, base, ensure)
    for kind in KINDS
    for base in BASES
    for ensure in (False, True)
    # PEFT itself refuses to tie rows that differ, or two kinds of training.
    if not (ensure and (kind == "other rows of both" or "head, " in kind))
    or (base == "untied" and "head, " not in kind)
]


def stays_tied(kind: str, base: str, ensure: bool) -> bool:
    """Return whether PEFT's function is one of a single matrix."""
    if base == "untied" or kind in _ROWS_APART or "LoRA of the head, " in kind:
        return False
    return ensure or kind in ("rows of the embedding", "the same rows of both")


def is_read(kind: str, base: str, ensure: bool) -> bool:
    """Return whether our model of the base can compute it."""
    if "LoRA" in kind:
        return base == "untied" and kind.startswith("LoRA of the head")
    return base == "untied" or stays_tied(kind, base, ensure)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Random Llamas of one layer."""
    folders = {}
    for name in BASES:
        folders[name] = tmp_path_factory.mktemp("base")
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=name != "untied",
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folders[name])
        if name == "tied with a stored copy":
            file = folders[name] / "model.safetensors"
            tensors = load_file(file)
            save_file({**tensors, HEAD: tensors[EMBEDDING]}, file, {"format": "pt"})
    return folders


@pytest.fixture(scope="module")
def forward():
    """Return our logits of a checkpoint's parameters; compiled once for each tree."""
    compiled = {}

    def logits(config, params):
        if config not in compiled:
            compiled[config] = jax.jit(Decoder(config).apply)
        return np.asarray(compiled[config]({"params": params}, TOKENS))

    return logits


def stock(folder: Path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def write_adapter(folder: Path, base: Path, settings: dict[str, Any], ensure: bool):
    """Write a trained adapter of stock PEFT; return its logits."""
    settings = json.loads(json.dumps(settings))  # PEFT changes its own lists
    targets = ["q_proj", "up_proj", *settings.pop("target_modules", ())]
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        task_type="CAUSAL_LM",
        ensure_weight_tying=ensure,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(stock(base), config).eval()
        with torch.no_grad():
            for leaf in model.parameters():
                if leaf.requires_grad:
                    leaf.add_(0.2 * torch.randn(leaf.shape))
        # PEFT ties the two factors of a tied head only where it reads them.
        model.save_pretrained(folder, save_embedding_layers=False)
        read = peft.PeftModel.from_pretrained(stock(base), folder).eval()
    return torch_logits(read)


@pytest.mark.parametrize(("kind", "base", "ensure"), CASES)
def test_each_adapter_is_peft_function_or_refused(
    bases, forward, tmp_path, kind, base, ensure
):
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    theirs = write_adapter(adapter, bases[base], KINDS[kind], ensure)

    merge_peft(out, read_files(adapter), base_folder=bases[base])
    np.testing.assert_allclose(torch_logits(stock(out)), theirs, atol=3e-4)
    tied = stays_tied(kind, base, ensure)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    config = read_config(out)
    ours = forward(config, load_params(out, config))
    np.testing.assert_allclose(ours, theirs, atol=3e-4)

    config = read_config(bases[base])
    params = load_params(bases[base], config)
    slots = module_paths(params, "llama"), tensor_paths(params, "llama")
    if not is_read(kind, base, ensure):
        with pytest.raises(InputError, match=r"ensure_weight_tying|--to merged"):
            from_peft(adapter, *slots)
        return
    found = from_peft(adapter, *slots)
    apply, variables = Decoder(config).apply, {"params": params}
    spec = make_spec(apply, variables, found.rules(), TOKENS, method="lora")
    trees = found.start(jax.random.key(0), spec, params=params)
    ours = forward(config, merge(params, *trees))
    np.testing.assert_allclose(ours, theirs, atol=3e-4)
