from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.demo_runs import ASSETS
from tsd_jax.huggingface import fingerprint


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(ASSETS / "model", tmp_path / "model")


def test_all_files_of_the_base_are_in_it(model):
    found = fingerprint(model)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.keys()
    content = (model / "config.json").read_bytes()
    assert found["config.json"] == hashlib.sha256(content).hexdigest()


def test_a_copy_has_the_same_and_other_training_another(model, tmp_path):
    before = fingerprint(model)
    assert fingerprint(shutil.copytree(model, tmp_path / "copy")) == before
    tensors = load_file(model / "model.safetensors")
    trained = {name: x + x.dtype.type(0.1) for name, x in tensors.items()}
    save_file(trained, model / "model.safetensors")
    after = fingerprint(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"model.safetensors"}


def test_the_header_counts_in_full(tmp_path, model):
    """Also far behind the first block, where all sampled bytes are the same."""
    for kind in ("a", "b"):
        names = [f"{'x' * 500}{n:03}" for n in range(99)]
        tensors = {name: np.zeros(40_000, np.float32) for name in (*names, kind)}
        save_file(tensors, model / "model.safetensors")
        shutil.copytree(model, tmp_path / kind)
    files = [fingerprint(tmp_path / kind)["model.safetensors"] for kind in "ab"]
    assert files[0] != files[1]
