from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.merge import merge_peft

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_a_copy_with_new_rows_grows_a_tied_base(tmp_path):
    base, out, q = tmp_path / "base", tmp_path / "out", "model.layers.0.q_proj"
    base.mkdir()
    config = {"model_type": "llama", "vocab_size": 4, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = {EMBEDDING: TABLE, f"{q}.weight": np.zeros((5, 3), np.float32)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    grown = np.concatenate([TABLE, TABLE[:1] - 7])
    stored = {
        EMBEDDING: grown,
        HEAD: grown,
        f"{q}.lora_A.weight": np.ones((2, 3), np.float32),
        f"{q}.lora_B.weight": np.ones((5, 2), np.float32),
    }
    named = {f"base_model.model.{name}": value for name, value in stored.items()}
    files = AdapterFiles(Path("adapter"), {"r": 2, "lora_alpha": 4}, named)
    merge_peft(out, files, base_folder=base)
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()  # still tied
    np.testing.assert_array_equal(found[EMBEDDING], grown)
    np.testing.assert_array_equal(found[f"{q}.weight"], np.full((5, 3), 4))
    assert json.loads((out / "config.json").read_text()) == {**config, "vocab_size": 5}


def test_a_module_is_merged_under_its_name_in_files(tmp_path):
    """transformers 5 calls mixtral's router mlp.gate; files hold block_sparse_moe."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    stored = "model.layers.0.block_sparse_moe.gate.weight"
    tensors = {stored: np.zeros((5, 3), np.float32)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    gate = "base_model.model.model.layers.0.mlp.gate"
    factors = {
        f"{gate}.lora_A.weight": np.ones((2, 3), np.float32),
        f"{gate}.lora_B.weight": np.ones((5, 2), np.float32),
    }
    files = AdapterFiles(Path("adapter"), {"r": 2, "lora_alpha": 4}, factors)
    merge_peft(out, files, base_folder=base)
    found = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(found[stored], np.full((5, 3), 4))
