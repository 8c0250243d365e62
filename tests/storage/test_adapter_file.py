from __future__ import annotations

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.trees import random_all, small_spec
from tsd_jax.core.adapter import delta
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.core.spec import Spec
from tsd_jax.storage import adapter_file, atomic
from tsd_jax.storage.adapter_file import load_adapter, save_adapter

METHODS = ["lora", "dash", "init", "tsd", "init+keep", "tsd+keep"]


def same(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def metadata_of(file):
    with safe_open(file, framework="np") as opened:
        return opened.metadata()


@pytest.fixture
def saved(tmp_path):
    spec = small_spec("tsd")
    file = tmp_path / "one.safetensors"
    save_adapter(file, *random_all(0, spec), spec, launched=True, base_model="org/base")
    return file, spec


def rewrite(file, **facts):
    """Change the facts of a file's header."""
    metadata = metadata_of(file)
    changed = json.loads(metadata["facts"]) | facts
    save_file(load_file(file), file, metadata | {"facts": json.dumps(changed)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(tmp_path, method, dtype):
    spec = small_spec(method, dora=method != "dash")
    trainable, directions = random_all(1, spec)
    trainable, directions = jax.tree.map(
        lambda x: x.astype(dtype), (trainable, directions)
    )
    file = tmp_path / "one.safetensors"
    save_adapter(file, trainable, directions, spec, launched=False)
    for given in (None, spec):
        found = load_adapter(file, given)
        same(found.trainable, trainable)
        same(found.directions, directions)
        assert found.spec == spec
        assert (found.launched, found.indices, found.base_model) == (False, None, None)


def test_what_is_said_beside_the_arrays_comes_back(tmp_path):
    spec = small_spec("tsd")
    indices = {
        "k": np.arange(4, dtype=np.int32),
        "stack": np.arange(12, dtype=np.int32).reshape(3, 4),
    }
    file = tmp_path / "one.safetensors"
    trees = random_all(0, spec)
    save_adapter(file, *trees, spec, launched=True, indices=indices, base_model="b")
    found = load_adapter(file)
    assert (found.launched, found.base_model) == (True, "b")
    chex.assert_trees_all_equal(found.indices, indices)


def test_adapters_of_one_spec_are_swapped_without_a_new_trace(tmp_path):
    spec = small_spec("tsd")
    pairs = [random_all(seed, spec) for seed in (0, 100)]
    for n, pair in enumerate(pairs):
        save_adapter(tmp_path / f"{n}", *pair, spec, launched=True)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def changes(trainable, directions):
        return {
            path: delta(trainable.adapters[path], directions[path])
            for path in trainable.adapters
        }

    for n, pair in enumerate(pairs):
        found = load_adapter(tmp_path / f"{n}")
        chex.assert_trees_all_equal(
            changes(found.trainable, found.directions), changes(*pair)
        )


def test_files_from_before_dora_are_read(saved):
    file, spec = saved
    facts = json.loads(metadata_of(file)["facts"])
    for kernel in facts["kernels"]:
        assert kernel.pop("dora") is False
    rewrite(file, kernels=facts["kernels"])
    assert load_adapter(file, spec).spec == spec


def test_dropout_may_differ_and_is_then_the_given_one(saved):
    file, spec = saved
    other = Spec(
        tuple(dataclasses.replace(k, dropout=0.5) for k in spec.kernels), spec.method
    )
    found = load_adapter(file, other)
    assert {a.kernel.dropout for a in found.trainable.adapters.values()} == {0.5}
    assert found.spec == other


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (small_spec("dash"), "saved for Method(name='tsd'"),
        (small_spec("tsd+keep"), "saved for Method(name='tsd'"),
        (small_spec("tsd", rank=3), "k: rank is 2, the spec has 3"),
        (small_spec("tsd", alpha=4.0), "k: alpha is 3.0, the spec has 4.0"),
        (small_spec("tsd", directions=3), "k: gains is 4, the spec has 3"),
        (small_spec("tsd", shape=(6, 7)), "the spec has no kernel 'stack'"),
        (small_spec("tsd", dora=True), "k: dora is False, the spec has True"),
    ],
)
def test_another_spec_is_refused_by_what_differs(saved, other, words):
    with pytest.raises(InputError, match="does not fit") as told:
        load_adapter(saved[0], other)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_trees_of_another_spec_are_not_written(tmp_path):
    trees = random_all(0, small_spec("tsd"))
    with pytest.raises(InputError, match=r"do not fit the spec: k/a is \(6, 2\)"):
        save_adapter(tmp_path / "x", *trees, small_spec("tsd", rank=3), launched=True)
    with pytest.raises(InputError, match="k/gain is nothing"):
        save_adapter(
            tmp_path / "x",
            *random_all(0, small_spec("init", rank=4)),
            small_spec("tsd", rank=4),
            launched=True,
        )
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    file, spec = saved
    old = file.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        save_adapter(file, *random_all(9, spec), spec, launched=True)
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_damaged_file_is_refused(saved, length):
    file, _ = saved
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="corrupt or truncated") as told:
        load_adapter(file)
    assert "\n" not in str(told.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_adapter(tmp_path / "none.safetensors")


def test_a_foreign_file_is_refused(tmp_path):
    save_file({"x": np.zeros(3)}, tmp_path / "x", {"format": "pt"})
    with pytest.raises(InputError, match="not an adapter file of tsd_jax"):
        load_adapter(tmp_path / "x")
    save_file({"x": np.zeros(3)}, tmp_path / "x")
    with pytest.raises(InputError, match="not an adapter file of tsd_jax"):
        load_adapter(tmp_path / "x")


def test_a_newer_version_is_refused(saved):
    file, _ = saved
    newer = metadata_of(file) | {"version": str(adapter_file.VERSION + 1), "facts": "?"}
    save_file(load_file(file), file, newer)
    with pytest.raises(InputError, match="format version 3, and this tsd_jax reads"):
        load_adapter(file)


@pytest.mark.parametrize(
    "facts",
    [
        {"method": None},
        {"method": {"name": "tsd", "what": 1}},
        {"kernels": [{}]},
        {"kernels": 3},
        {"kernels": []},
        {"whole": 3},
        {"whole": [{"path": "norm/scale"}]},
    ],
)
def test_a_damaged_header_is_refused(saved, facts):
    file, _ = saved
    rewrite(file, **facts)
    with pytest.raises(InputError, match="is damaged") as told:
        load_adapter(file)
    assert "\n" not in str(told.value)


def test_a_header_that_contradicts_the_tensors_is_refused(saved):
    file, _ = saved
    kernels = json.loads(metadata_of(file)["facts"])["kernels"]
    kernels[0]["rank"] = 3
    rewrite(file, kernels=kernels)
    with pytest.raises(InputError, match=r"k/a is \(6, 2\), the spec has \(6, 3\)"):
        load_adapter(file)


def test_a_type_jax_would_round_is_refused(saved):
    file, _ = saved
    wide = {name: x.astype(np.float64) for name, x in load_file(file).items()}
    save_file(wide, file, metadata_of(file))
    with pytest.raises(InputError, match="float64, which JAX would round"):
        load_adapter(file)
    with jax.enable_x64(True):
        found = load_adapter(file)
    assert found.trainable.adapters["k"].a.dtype == jnp.float64


PARTS = (
    FullSpec(path="norm/scale", shape=(5,)),
    FullSpec(path="embed/embedding", shape=(7, 3), rows=(4, 6)),
)


def with_full_params(seed: int = 0) -> tuple[Spec, Any, Any]:
    """Return a spec with parts, and trees of random numbers for it."""
    spec = small_spec("tsd")
    trainable, directions = random_all(seed, spec)
    rng = np.random.default_rng(seed)
    for part in PARTS:
        value = jnp.asarray(rng.normal(size=part.value_shape), jnp.float32)
        trainable.full[part.path] = FullParam(value, part)
    return Spec(spec.kernels, spec.method, PARTS), trainable, directions


def test_full_parameters_come_back_bit_for_bit(tmp_path):
    spec, trainable, directions = with_full_params()
    file = tmp_path / "one.safetensors"
    save_adapter(file, trainable, directions, spec, launched=True)
    stored = load_file(file)
    assert stored["embed/embedding/value"].shape == (2, 3)
    for given in (None, spec):
        found = load_adapter(file, given)
        assert found.spec == spec
        same((found.trainable, found.directions), (trainable, directions))


def test_a_spec_of_other_full_parameters_is_refused(tmp_path):
    spec, trainable, directions = with_full_params()
    file = tmp_path / "one.safetensors"
    save_adapter(file, trainable, directions, spec, launched=True)
    fewer = Spec(spec.kernels, spec.method, PARTS[:1])
    with pytest.raises(
        InputError, match="the spec has no full parameter 'embed/embedding'"
    ):
        load_adapter(file, fewer)
    moved = dataclasses.replace(PARTS[1], rows=(5, 7))
    other = Spec(spec.kernels, spec.method, (PARTS[0], moved))
    with pytest.raises(InputError, match=r"rows is \(4, 6\), the spec has \(5, 7\)"):
        load_adapter(file, other)
    with pytest.raises(InputError, match="embed/embedding/value is"):
        save_adapter(file, trainable, directions, small_spec("tsd"), launched=True)


def test_files_of_the_first_version_are_read(saved):
    """They have no list of parts."""
    file, spec = saved
    metadata = metadata_of(file)
    facts = json.loads(metadata["facts"])
    assert facts.pop("whole") == []
    old = metadata | {"version": "1", "facts": json.dumps(facts)}
    before = load_adapter(file)
    save_file(load_file(file), file, old)
    found = load_adapter(file, spec)
    same((found.trainable, found.directions), (before.trainable, before.directions))
