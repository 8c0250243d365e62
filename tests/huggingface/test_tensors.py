from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.tensors import open_checkpoint

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5).astype(jnp.bfloat16)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(folder):
    save_file({"a": A}, folder / FIRST)
    save_file({"b": B}, folder / SECOND)
    write_index(folder, {"a": FIRST, "b": SECOND})


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_described_and_read_in_part(tmp_path, sharded):
    if sharded:
        write_shards(tmp_path)
    else:
        save_file({"a": A, "b": B}, tmp_path / SINGLE)
    tensors = open_checkpoint(tmp_path)
    assert tensors.keys() == {"a", "b"}
    assert (tensors["a"].shape, tensors["a"].dtype) == ((3, 4), np.float32)
    assert (tensors["b"].shape, tensors["b"].dtype) == ((5,), jnp.bfloat16)
    assert tensors["b"].file == tmp_path / (SECOND if sharded else SINGLE)
    part = tensors["a"].read((slice(1, 3), slice(None, 2)))
    np.testing.assert_array_equal(part, A[1:3, :2])
    whole = tensors["b"].read((slice(None),))
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(whole, B)


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


DAMAGE = {
    "no bytes": lambda file: cut(file, 0),
    "half a header": lambda file: cut(file, 40),
    "a lost byte": lambda file: cut(file, file.stat().st_size - 1),
    "bytes too many": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "no header": lambda file: file.write_bytes(b"\xff" * 300),
    "a page of the web": lambda file: file.write_text("<!doctype html>" * 20),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(tmp_path, sharded, damage):
    if sharded:
        write_shards(tmp_path)
    else:
        save_file({"a": A, "b": B}, tmp_path / SINGLE)
    damage(tmp_path / (SECOND if sharded else SINGLE))
    with pytest.raises(InputError, match="corrupt or truncated") as caught:
        open_checkpoint(tmp_path)
    assert (SECOND if sharded else SINGLE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_kind_are_refused(tmp_path):
    save_file({"a": A.astype(np.int8)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"model\.safetensors stores tensor 'a' as I8"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=f"{tmp_path} holds neither.*save_pretrained"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / SECOND).unlink()
    with pytest.raises(InputError, match=f"{SECOND} does not exist"):
        open_checkpoint(tmp_path)


def test_a_shard_without_its_tensor_is_named(tmp_path):
    write_shards(tmp_path)
    write_index(tmp_path, {"a": FIRST, "b": FIRST})
    with pytest.raises(InputError, match=f"{FIRST} lacks tensor 'b'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 1}, {"a": "../elsewhere.safetensors"}, {"a": ""}]
)
def test_an_index_that_points_nowhere_is_named(tmp_path, weight_map):
    write_shards(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(InputError, match=INDEX):
        open_checkpoint(tmp_path)
