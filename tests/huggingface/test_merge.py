from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.trees import random_all, small_spec
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import merge
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.merge import merge_factors, to_merged

IN, OUT, LAYERS = 6, 7, 3
INDEX = "model.safetensors.index.json"
MODULES: Mapping[str, tuple[str, int | None]] = {
    f"model.layers.{n}.up": ("stack", n) for n in range(LAYERS)
} | {"lm_head": ("k", None)}
NAMES: Mapping[tuple[str, int | None], str] = {
    place: name for name, place in MODULES.items()
}


def module_name(path: str, layer: int | None) -> str:
    return NAMES[path, layer]


def weights(dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {f"{name}.weight": (OUT, IN) for name in MODULES}
    shapes |= {"model.norm.weight": (IN,), "model.embed_tokens.weight": (11, IN)}
    return {n: rng.normal(size=shape).astype(dtype) for n, shape in shapes.items()}


def base(
    folder, *, dtype: Any = np.float32, shards: int = 1, head: bool = True, **config
):
    """Write a checkpoint and what lies beside it; give its weights."""
    folder.mkdir(parents=True)
    tensors = weights(dtype)
    if not head:
        del tensors["lm_head.weight"]
    config = {"model_type": "llama", "torch_dtype": jnp.dtype(dtype).name} | config
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"file": name}))
    (folder / "LICENSE").write_text("free")
    (folder / "notes.bin").write_bytes(b"not of the model")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    where = {
        name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors"
        for n, name in enumerate(tensors)
    }
    for file in {*where.values()}:
        part = {name: tensors[name] for name in tensors if where[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1, "total_parameters": 5}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    return tensors


def trees(scale: float = 1.0):
    return random_all(0, small_spec("tsd"), scale)


def dense(trainable, directions, place: tuple[str, int | None]) -> np.ndarray:
    """dK^T of one module, in float64."""
    path, layer = place
    one, two = trainable.adapters[path], directions[path]
    a, b, gain = (np.asarray(x, np.float64) for x in (one.a, one.b, one.gain))
    left, right, offset = (
        np.asarray(x, np.float64) for x in (two.left, two.right, two.offset)
    )
    coordinates = offset.copy()
    coordinates[..., : gain.shape[-1]] += gain
    change = trainable.adapters[path].kernel.scale * a @ b
    change = change + (left * coordinates[..., None, :]) @ right.swapaxes(-1, -2)
    return (change if layer is None else change[layer]).T


def read(folder) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: tensor for file in files for n, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_change_goes_into_its_weight(tmp_path, shards):
    old = base(tmp_path / "base", shards=shards)
    pair = trees()
    out = tmp_path / "deep" / "out"
    export = to_merged(out, *pair, module_name, base_folder=tmp_path / "base")
    found = read(out)
    assert found.keys() == old.keys()
    for name, place in MODULES.items():
        expected = np.float64(old[f"{name}.weight"]) + dense(*pair, place)
        np.testing.assert_allclose(found[f"{name}.weight"], expected, atol=5e-6)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(found[name], old[name])
    assert (export.error, export.dtypes) == (0.0, ("float32",))
    assert export.errors == dict.fromkeys(MODULES, 0.0)


def test_rows_are_scaled_to_their_magnitudes(tmp_path):
    """DoRA: m o (W + dK^T) / ||W + dK^T||; one row that is zero stays so."""
    spec = small_spec("tsd", dora=True)
    trainable, directions = random_all(0, spec)
    trainable.adapters["k"] = trainable.adapters["k"].replace(
        b=trainable.adapters["k"].b.at[:, 2].set(0)
    )
    none = directions["k"].right.at[2].set(0)
    directions["k"] = directions["k"].replace(right=none)
    base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    before = load_file(file)
    before["lm_head.weight"][2] = 0
    save_file(before, file, {"format": "pt"})
    out = tmp_path / "out"
    to_merged(out, trainable, directions, module_name, base_folder=tmp_path / "base")
    after = load_file(out / "model.safetensors")
    for name, (path, layer) in MODULES.items():
        total = before[f"{name}.weight"] + dense(trainable, directions, (path, layer))
        magnitude = np.asarray(trainable.adapters[path].magnitude, np.float64)
        magnitude = magnitude if layer is None else magnitude[layer]
        norms = np.linalg.norm(total, axis=1)
        scale = magnitude / np.where(norms > 0, norms, 1)
        np.testing.assert_allclose(
            after[f"{name}.weight"], scale[:, None] * total, rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(after["lm_head.weight"][2], 0)


def test_shards_and_index_are_the_bases(tmp_path):
    base(tmp_path / "base", shards=3)
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as new
    to_merged(
        out, *trees(), module_name, base_folder=tmp_path / "base", dtype="bfloat16"
    )
    theirs, ours = (
        {file.name: set(load_file(file)) for file in folder.glob("*.safetensors")}
        for folder in (tmp_path / "base", out)
    )
    assert len(theirs) == 3
    assert ours == theirs
    index = json.loads((out / INDEX).read_text())
    old = json.loads((tmp_path / "base" / INDEX).read_text())
    assert index["weight_map"] == old["weight_map"]
    size = sum(tensor.nbytes for tensor in read(out).values())
    assert index["metadata"] == {"total_size": size, "total_parameters": 5}
    with safe_open(next(out.glob("*.safetensors")), framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert {file.name for file in tmp_path.iterdir()} == {"base", "out"}


def test_what_lies_beside_is_copied(tmp_path):
    base(tmp_path / "base")
    out = tmp_path / "out"
    to_merged(out, *trees(), module_name, base_folder=tmp_path / "base")
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json"),
        *("chat_template.jinja", "LICENSE", "model.safetensors"),
    }
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_text() == (tmp_path / "base" / name).read_text()
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ()])
def test_a_chosen_type_holds_for_all_and_for_the_config(tmp_path, keys):
    base(tmp_path / "base", dtype=jnp.bfloat16)
    config = {"model_type": "llama"} | dict.fromkeys(keys, "bfloat16")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    export = to_merged(
        out, *trees(), module_name, base_folder=tmp_path / "base", dtype="float32"
    )
    assert {tensor.dtype for tensor in read(out).values()} == {np.dtype("float32")}
    expected = dict.fromkeys(keys or ["torch_dtype"], "float32")
    found = json.loads((out / "config.json").read_text())
    assert found == {"model_type": "llama"} | expected
    assert export.error == 0


def test_rounding_is_measured_and_told(tmp_path, caplog):
    old = base(tmp_path / "base", dtype=jnp.bfloat16)
    pair = trees(0.05)
    out = tmp_path / "out"
    export = to_merged(out, *pair, module_name, base_folder=tmp_path / "base")
    found, lost, norms = read(out), [], []
    for name, place in MODULES.items():
        change = dense(*pair, place)
        exact = np.float64(old[f"{name}.weight"]) + change
        merged_weight = found[f"{name}.weight"]
        assert merged_weight.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            merged_weight, exact.astype(np.float32).astype(jnp.bfloat16)
        )
        lost.append(np.linalg.norm(np.float64(merged_weight) - exact))
        norms.append(np.linalg.norm(change))
        assert export.errors[name] == pytest.approx(lost[-1] / norms[-1], rel=1e-4)
    expected = np.linalg.norm(lost) / np.linalg.norm(norms)
    assert export.error == pytest.approx(expected, rel=1e-4)
    assert export.error > 0.1
    assert "rounding to bfloat16 changed the merged deltas by" in caplog.text


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_that_trains_apart_gets_a_weight_of_its_own(tmp_path, shards):
    folder = tmp_path / "base"
    old = base(folder, shards=shards, tie_word_embeddings=True, head=False)
    assert "lm_head.weight" not in old
    embedding = "model.embed_tokens.weight"
    pair = Factors(np.ones((IN, 1), np.float32), np.ones((1, 11), np.float32))
    done = merge_factors(
        tmp_path / "out", {"lm_head": pair}, base_folder=folder, head_follows=True
    )
    assert [*done.errors] == ["lm_head"]
    found = read(tmp_path / "out")
    np.testing.assert_array_equal(found[embedding], old[embedding])
    np.testing.assert_array_equal(found["lm_head.weight"], old[embedding] + 1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        files = index["weight_map"]
        assert files["lm_head.weight"] == files[embedding]
        size = sum(tensor.nbytes for tensor in found.values())
        assert index["metadata"]["total_size"] == size


def test_other_changes_leave_a_tied_head_tied(tmp_path):
    base(tmp_path / "base", tie_word_embeddings=True)
    pair = random_all(0, small_spec("tsd", shape=(IN, OUT)))
    to_merged(
        tmp_path / "out",
        *pair,
        lambda path, layer: "model.layers.0.up",
        base_folder=tmp_path / "base",
    )
    assert "lm_head.weight" in read(tmp_path / "out")  # a spare copy stays
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True


def test_nothing_is_written_over(tmp_path):
    folder = tmp_path / "base"
    base(folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", folder / ".." / "base"):
        with pytest.raises(InputError, match="the base's own folder"):
            to_merged(out, *trees(), module_name, base_folder=folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        to_merged(foreign, *trees(), module_name, base_folder=folder)
    with pytest.raises(InputError, match="is not empty"):
        to_merged(foreign / "thesis.txt", *trees(), module_name, base_folder=folder)
    with pytest.raises(InputError, match="is a file"):
        to_merged(
            foreign / "thesis.txt" / "out", *trees(), module_name, base_folder=folder
        )
    assert before == {file: file.read_bytes() for file in folder.iterdir()}
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    base(tmp_path / "base", shards=3)
    written = []

    def fail(tensors, path, metadata):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(merge, "save_file", fail)
    with pytest.raises(InputError, match="No space left on device"):
        to_merged(
            tmp_path / "out", *trees(), module_name, base_folder=tmp_path / "base"
        )
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_one_shard_is_held_at_a_time(tmp_path, monkeypatch):
    base(tmp_path / "base", shards=3)
    held = []

    def watch(tensors, path, metadata):
        held.append(set(tensors))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(merge, "save_file", watch)
    to_merged(tmp_path / "out", *trees(), module_name, base_folder=tmp_path / "base")
    assert [len(names) for names in held] == [2, 2, 2]
    assert len(set().union(*held)) == 6


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    def refused(words, **config):
        folder = tmp_path / words.split()[0]
        if not folder.exists():
            base(folder, **config)
        with pytest.raises(InputError, match=words) as told:
            to_merged(tmp_path / "out", *pair, name, base_folder=folder)
        assert "\n" not in str(told.value)

    pair: tuple[Any, Any] = trees()
    name: Any = module_name
    packed = base(tmp_path / "is", quantization_config={"bits": 4})
    packed["model.packed.qweight"] = np.ones((2, 2), np.int32)
    save_file(packed, tmp_path / "is" / "model.safetensors", {"format": "pt"})
    refused("is quantized")
    name = lambda path, layer: f"model.{path}.{layer}"  # noqa: E731
    refused("has no tensor 'model.k.None.weight'")
    name = module_name
    pair = random_all(0, small_spec("tsd", shape=(8, 7)))
    refused(r"has 'lm_head.weight' of shape \(7, 6\)")
    pair = trees()
    adapter = pair[0].adapters["k"]
    pair[0].adapters["k"] = adapter.replace(a=adapter.a * np.inf)
    refused("holds values that are not finite")
    with pytest.raises(InputError, match="does not exist"):
        to_merged(tmp_path / "out", *trees(), name, base_folder=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_damaged_base_is_refused(tmp_path):
    folder = tmp_path / "base"
    base(folder, shards=3)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(InputError, match="corrupt or truncated"):
        to_merged(tmp_path / "out", *trees(), module_name, base_folder=folder)
    shard.unlink()
    with pytest.raises(InputError, match="does not exist"):
        to_merged(tmp_path / "out", *trees(), module_name, base_folder=folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "../a"}}')
    with pytest.raises(InputError, match='no "weight_map" from tensors'):
        to_merged(tmp_path / "out", *trees(), module_name, base_folder=folder)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_type_without_fractions_is_refused(tmp_path):
    base(tmp_path / "base")
    with pytest.raises(InputError, match="int8 cannot hold weights"):
        to_merged(
            tmp_path / "out",
            *trees(),
            module_name,
            base_folder=tmp_path / "base",
            dtype="int8",
        )


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_value_that_a_cast_loses_is_refused(tmp_path, name):
    folder, out = tmp_path / "base", tmp_path / "out"
    tensors = base(folder, dtype=jnp.bfloat16)
    tensors[name].flat[3] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"'{name}' holds values that are too large"):
        to_merged(out, *trees(), module_name, base_folder=folder, dtype="float16")
    assert not out.exists()
    to_merged(out, *trees(), module_name, base_folder=folder)


def test_an_adapter_that_is_not_finite_is_refused(tmp_path):
    base(tmp_path / "base")
    pair = Factors(np.full((IN, 1), np.nan), np.ones((1, OUT)))
    with pytest.raises(InputError, match=r"the adapter of lm_head.* not finite"):
        merge_factors(
            tmp_path / "out",
            {"lm_head": pair},
            base_folder=tmp_path / "base",
            head_follows=True,
        )
