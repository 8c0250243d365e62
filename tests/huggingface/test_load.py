from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from tests.helpers.decoders import PUBLISHED, write_decoder
from tests.helpers.small_llama import CONFIG
from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization, Quantized, dequantize, quantize
from tsd_jax.huggingface import device_loader, names, read_config
from tsd_jax.huggingface.load import load_params
from tsd_jax.huggingface.save import write_checkpoint
from tsd_jax.huggingface.tensors import StoredTensor
from tsd_jax.models.decoder import DECODER_RULES, LINEAR_KERNELS, Decoder
from tsd_jax.training.sharding import make_mesh, param_shardings

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path, params):
    write_checkpoint(tmp_path, CONFIG, params)
    return tmp_path


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_written_is_read_back(folder, params):
    found = load_params(folder, CONFIG)
    assert_same(found, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_layers_can_be_left_apart(folder, params):
    found = load_params(folder, CONFIG, scan_layers=False)
    assert {f"layers_{n}" for n in range(4)} < found.keys()
    for n in range(4):
        part = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        assert_same(found[f"layers_{n}"], part)


def test_weights_are_cast_on_the_way(folder, params, tmp_path_factory):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_same(load_params(folder, CONFIG, dtype="bfloat16"), half)
    other = tmp_path_factory.mktemp("half")
    write_checkpoint(other, CONFIG, params, dtype=jnp.bfloat16)
    stored = load_params(other, CONFIG)
    assert_same(stored, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("bfloat16")}
    assert json.loads((other / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = load_params(other, CONFIG, dtype=jnp.float32)
    assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))


def test_shards_are_read_through_their_index(folder, params):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for n, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{n % 3}.safetensors"
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    assert_same(load_params(folder, CONFIG), params)


SPECS = {
    "embed_tokens/embedding": P("tensor", "fsdp"),
    "lm_head/kernel": P("fsdp", "tensor"),
    "layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
    "layers/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
    "layers/mlp/up_proj/kernel": P(None, ("fsdp", "data"), None),
    "layers/mlp/down_proj/kernel": P(None, ("tensor", "fsdp"), None),
    "layers/self_attn/k_proj/kernel": P("fsdp", None, "tensor"),
    "layers/self_attn/k_proj/bias": P("fsdp", "tensor"),
}


@pytest.fixture
def reads(monkeypatch):
    """The number of elements of every read."""
    sizes = []
    plain = StoredTensor.read

    def read(self, index):
        part = plain(self, index)
        sizes.append((self.name, part.size))
        return part

    monkeypatch.setattr(StoredTensor, "read", read)
    return sizes


def test_every_device_gets_its_part_and_no_more_is_read(folder, params, reads):
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    shardings = {
        path: NamedSharding(mesh, SPECS.get(path, P())) for path in flat(params)
    }
    tree = traverse_util.unflatten_dict(shardings, sep="/")
    found = load_params(folder, CONFIG, shardings=tree)
    assert_same(found, params)
    for path, leaf in flat(found).items():
        whole = np.asarray(flat(params)[path])
        assert leaf.sharding == shardings[path]
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    shape = flat(found)["layers/mlp/up_proj/kernel"].addressable_shards[0].data.shape
    assert shape == (4, 2, 20)
    # Every element is read once, however many devices hold it.
    sizes = {name: sum(n for each, n in reads if each == name) for name, _ in reads}
    tensors = names.to_huggingface(params, CONFIG)
    assert sizes == {name: tensor.size for name, tensor in tensors.items()}
    # And no read takes in more than one device holds of one layer.
    largest = max(n for name, n in reads if name == "model.layers.1.mlp.up_proj.weight")
    assert largest == 2 * 20


def test_without_shardings_arrays_are_free_to_move(folder):
    leaf = load_params(folder, CONFIG)["norm"]["scale"]
    assert not leaf.committed


def test_shardings_of_another_tree_are_refused(folder, reads):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shardings = {"norm": {"scale": NamedSharding(mesh, P())}}
    with pytest.raises(InputError, match="shardings and parameters differ"):
        load_params(folder, CONFIG, shardings=shardings)
    assert not reads


def drop(tensors):
    del tensors["model.layers.1.self_attn.q_proj.weight"], tensors["model.norm.weight"]


def add(tensors):
    tensors["model.layers.4.mlp.up_proj.weight"] = np.ones(3, np.float32)


def reshape(tensors):
    tensors["model.norm.weight"] = np.ones(9, np.float32)


def transpose(tensors):
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"lacks tensor 'model\.layers\.1\.self_attn.*\(and 1 more\)"),
        (add, r"holds tensor 'model\.layers\.4\.mlp.*', which config\.json does not"),
        (reshape, r"'model\.norm\.weight' with shape \(9,\).*asks for \(8,\)"),
        (transpose, r"'model\.layers\.2\.mlp.*\(8, 20\).*asks for \(20, 8\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_reading(
    folder, reads, spoil, message
):
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=message) as caught:
        load_params(folder, CONFIG)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not reads


def test_a_truncated_file_is_refused_before_reading(folder, reads):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{file} is corrupt or truncated"):
        load_params(folder, CONFIG)
    assert not reads


def test_a_headless_checkpoint_of_an_untied_model_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"lacks tensor 'lm_head\.weight'"):
        load_params(folder, CONFIG)


def test_buffers_and_the_copy_of_a_tied_head_are_passed_over(folder, params):
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tensors = load_file(folder / WEIGHTS)
    for n in range(4):
        name = f"model.layers.{n}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / WEIGHTS)
    found = load_params(folder, tied)
    assert "lm_head" not in found
    assert_same(found, {name: params[name] for name in found})


@pytest.mark.parametrize(
    ("scan_layers", "spread"), [(True, False), (True, True), (False, False)]
)
def test_kernels_are_quantized_on_the_way(tmp_path, monkeypatch, scan_layers, spread):
    """Of linear layers, experts among them, and of no other; matrix by matrix."""
    monkeypatch.setattr(device_loader, "AT_ONCE", 0)
    write_decoder(tmp_path, PUBLISHED["mixtral"])
    config = read_config(tmp_path)
    plain = load_params(tmp_path, config, scan_layers=scan_layers)
    how = Quantization(format="int8", tile=8)
    want = quantize(plain, how, LINEAR_KERNELS, jnp.bfloat16)
    places = None
    if spread:
        mesh = make_mesh((1, 4, 2))
        places = param_shardings(want, DECODER_RULES, mesh)
    found = load_params(
        tmp_path,
        config,
        dtype=jnp.bfloat16,
        scan_layers=scan_layers,
        quantization=how,
        shardings=places,
    )
    boxes = {p: x for p, x in flat(found).items() if isinstance(x, Quantized)}
    layers = 1 if scan_layers else 4
    assert len(boxes) == 7 * layers
    parts = {path.split("/")[-2] for path in boxes}
    assert parts == {
        f"{part}_proj" for part in ["q", "k", "v", "o", "gate", "up", "down"]
    }
    for path, leaf in flat(found).items():
        if path not in boxes:
            assert leaf.dtype == jnp.bfloat16
            continue
        other = flat(want)[path]
        assert (leaf.format, leaf.dtype) == ("int8", jnp.bfloat16)
        np.testing.assert_array_equal(leaf.values, other.values)
        np.testing.assert_array_equal(leaf.scale, other.scale)
        if places is not None:
            place = flat(places)[path]
            assert leaf.values.sharding == leaf.scale.sharding == place
    if scan_layers and not spread:
        opened = {p: dequantize(x) for p, x in flat(found).items()}
        tree = traverse_util.unflatten_dict(opened, sep="/")
        model = Decoder(config, jnp.bfloat16, jnp.bfloat16)
        tokens = jnp.arange(6)[None]
        run = jax.jit(lambda params: model.apply({"params": params}, tokens))
        np.testing.assert_array_equal(run(found), run(tree))


def test_a_kernel_that_tiles_do_not_divide_is_refused_before_reading(folder, reads):
    how = Quantization(format="nf4", tile=16)
    with pytest.raises(InputError, match=r"axis of 20 .*of 16; use a tile of 4"):
        load_params(folder, CONFIG, quantization=how)
    assert not reads


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "fault"),
    [
        (np.nan, "float32", None, "not finite"),
        (-np.inf, "bfloat16", "float32", "not finite"),
        (3.4e38, "float32", "bfloat16", "too large for bfloat16"),
        (1e5, "bfloat16", "float16", "too large for float16"),
    ],
)
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_value_that_is_or_becomes_infinite_is_refused_with_its_tensor(
    folder, name, value, stored, dtype, fault
):
    tensors = load_file(folder / WEIGHTS)
    tensors = {n: each.astype(jnp.dtype(stored)) for n, each in tensors.items()}
    tensors[name].flat[-1] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=f"'{name}' holds values that are {fault}"):
        load_params(folder, CONFIG, dtype=dtype)
