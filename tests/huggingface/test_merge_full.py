"""Checkpoints that grow with full parameters, against tensors written by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.full_params import (
    HEAD,
    LAYERS,
    TABLE,
    D,
    V,
    module_name,
    parts,
    trees,
)
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import (
    FullTensor,
)
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.merge_full import grown_vocabulary

PLACES = ("model.k", *(f"model.layers.{n}.stack" for n in range(3)))


def checkpoint(folder, *, tied: bool, dtype="float32", head: bool = True):
    """Write a base with a vocabulary of V."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    shapes = {f"{name}.weight": (7, 6) for name in PLACES} | {TABLE: (V, D)}
    shapes |= {f"model.layers.{n}.norm.weight": (D,) for n in range(LAYERS)}
    shapes |= {HEAD: (V, D)} if head else {}
    tensors = {n: rng.normal(size=shape).astype(dtype) for n, shape in shapes.items()}
    if tied and head:
        tensors[HEAD] = tensors[TABLE]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"vocab_size": V, "tie_word_embeddings": tied, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("old")
    (folder / "added_tokens.json").write_text("old")
    return tensors


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_checkpoint_grows(tmp_path, tied):
    """With its tokenizer; a tied head that is stored follows its table."""
    old = checkpoint(tmp_path / "base", tied=tied)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text("new")
    some = {"embed_tokens/embedding", "layers/norm/scale"}
    some |= set() if tied else {"lm_head/kernel"}
    pair = trees(*some)
    out = tmp_path / "out"
    to_merged(
        out,
        *pair,
        module_name,
        base_folder=tmp_path / "base",
        tokenizer_folder=tmp_path / "new",
    )
    found = load_file(out / "model.safetensors")
    table = np.concatenate([old[TABLE], pair[0].full["embed_tokens/embedding"].value])
    np.testing.assert_array_equal(found[TABLE], table)
    new = parts()["lm_head/kernel"].value.T
    head = table if tied else np.concatenate([old[HEAD], new])
    np.testing.assert_array_equal(found[HEAD], head)
    np.testing.assert_array_equal(
        found["model.layers.1.norm.weight"], pair[0].full["layers/norm/scale"].value[1]
    )
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == V + 2
    assert (out / "tokenizer.json").read_text() == "new"
    assert not (out / "added_tokens.json").exists()


def test_a_checkpoint_grown_in_one_place_is_refused(tmp_path):
    checkpoint(tmp_path / "base", tied=False)
    pair = trees("embed_tokens/embedding")
    with pytest.raises(InputError, match="vocabulary would have 7 and 5 rows in"):
        to_merged(tmp_path / "out", *pair, module_name, base_folder=tmp_path / "base")
    assert not (tmp_path / "out").exists()


def test_tensors_of_another_base_are_refused(tmp_path):
    def grown(name, value, rows=None, shape=(V, D)):
        tensor = FullTensor(name, "weight", np.zeros(value), rows)
        return grown_vocabulary({tensor.name: tensor}, {tensor.name: shape}, tmp_path)

    assert grown("x", (V, D)) is None
    assert grown("x", (1, D), (V - 1,)) is None
    assert grown("lm_head", (V + 3, D)) == V + 3
    assert grown("lm_head", (1, D), (V,)) == V + 1
    for bad in [
        ("x", (V + 1, D)),
        ("x", (1, D), (V,)),
        ("lm_head", (V, D + 1)),
        ("lm_head", (1, D), (V + 1,)),  # a row between would be nothing
        ("lm_head", (1, D + 1), (V,)),
    ]:
        with pytest.raises(InputError, match="does not fit the trained"):
            grown(*bad)
    tensor = FullTensor("y", "weight", np.zeros(3))
    with pytest.raises(InputError, match=r"has no tensor 'y.weight'"):
        grown_vocabulary({"y.weight": tensor}, {}, tmp_path)
