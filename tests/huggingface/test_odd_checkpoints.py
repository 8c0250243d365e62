"""Checkpoints as they are found, which stock transformers loads as well."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.decoders import PUBLISHED, write_decoder
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import load_params, read_config
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.merge import merge_factors

UP = "model.layers.1.mlp.up_proj"
PAIR = Factors(np.ones((32, 1), np.float32), np.ones((1, 48), np.float32))


@pytest.fixture
def folder(tmp_path):
    """A tied Llama."""
    base = tmp_path / "base"
    base.mkdir()
    write_decoder(base, {**PUBLISHED["llama"], "tie_word_embeddings": True})
    return base


def load(folder):
    return paths.flatten(load_params(folder, read_config(folder)))


def configure(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def shard(folder, where: str, **listed: str):
    """Put the weights into a file that an index names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / where).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / where, {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, where) | listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def flat_names(folder):
    """Save the model without its head, as LlamaModel does."""
    file = folder / "model.safetensors"
    tensors = {n.removeprefix("model."): x for n, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    configure(folder, architectures=["LlamaModel"])


CHANGES = {
    "./": lambda folder: shard(folder, "./one.safetensors"),
    "sub/": lambda folder: shard(folder, "sub/one.safetensors"),
    "a head that is listed alone": lambda folder: shard(
        folder, "one.safetensors", **{"lm_head.weight": "one.safetensors"}
    ),
    "flat names": flat_names,
    "stale quantization": lambda folder: configure(
        folder, quantization_config={"quant_method": "gptq", "bits": 4}
    ),
    "empty quantization": lambda folder: configure(folder, quantization_config={}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_odd_checkpoint_is_the_same_model(folder, tmp_path, change):
    expected = load(folder)
    CHANGES[change](folder)
    found = load(folder)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)
    out = tmp_path / "out"
    merge_factors(out, {UP: PAIR}, base_folder=folder, head_follows=True)
    merged = load(out)
    for path, leaf in expected.items():
        changed = np.array(leaf)
        if path == "layers/mlp/up_proj/kernel":
            changed[1] += 1
        np.testing.assert_array_equal(merged[path], changed)


@pytest.mark.parametrize("where", ["../one.safetensors", "/one.safetensors", "", "."])
def test_an_index_stays_inside_its_folder(folder, where):
    shard(folder, "one.safetensors", **{"model.norm.weight": where})
    with pytest.raises(InputError, match='no "weight_map" from tensors'):
        load(folder)


def test_an_untied_model_without_its_head_is_refused(folder):
    flat_names(folder)
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lacks tensor 'lm_head\.weight'"):
        load(folder)
