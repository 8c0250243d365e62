from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.trees import small_spec, trained
from tsd_jax.core.layout import Layout
from tsd_jax.extraction import spectra_cache
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.settings import Extraction
from tsd_jax.extraction.spectra_cache import fingerprint
from tsd_jax.training.sharding import make_mesh

SHAPE = (5, 16, 24)


class Memory:
    """A store that counts."""

    def __init__(self):
        self.kept, self.saved, self.asked = {}, 0, 0

    def load(self, key, size):
        self.asked += 1
        found = self.kept.get(key)
        assert found is None or found[0].shape == (size,)
        return found

    def save(self, key, values, vectors):
        self.saved += 1
        self.kept[key] = (np.array(values), np.array(vectors))


def problem(method="tsd", seed=3, rank=3):
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    spec = small_spec(method, shape=SHAPE, layout=layout, rank=rank, directions=4)
    kernel = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    return spec, kernel, trained(0, spec)[0]


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("where", ["devices", "hosts"])
@pytest.mark.parametrize("spec", [None, P(None, "fsdp", "tensor")], ids=str)
def test_a_second_launch_decomposes_nothing(spec, where):
    """Another method, rank and adapter on the same base finds every spectrum."""
    store = Memory()
    extraction = Extraction(where=where, store=store)
    saved = []
    for method, rank in (("tsd", 3), ("dash", 2)):
        kernel_spec, kernel, trainable = problem(method, rank=rank)
        params = {"k": jnp.asarray(kernel)}
        want = launch(params, trainable, kernel_spec)
        if spec is not None:
            sharding = NamedSharding(make_mesh((2, 2, 2)), spec)
            params = {"k": jax.device_put(kernel, sharding)}
        got = launch(params, trainable, kernel_spec, extraction=extraction)
        assert_same(got, want)
        assert len(store.kept) == 5
        saved.append(store.saved)
    assert saved[0] == saved[1] > 0
    assert store.asked >= 10


def test_another_base_is_decomposed_anew():
    store = Memory()
    for seed in (3, 4):
        spec, kernel, trainable = problem(seed=seed)
        params = {"k": jnp.asarray(kernel)}
        got = launch(params, trainable, spec, extraction=Extraction(store=store))
        assert_same(got, launch(params, trainable, spec))
    assert len(store.kept) == store.saved == 10


def test_fingerprints_tell_bits_shapes_and_types_apart():
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    other = matrix.copy()
    other[2, 3] = np.nextafter(other[2, 3], np.float32(100))
    different = [matrix, other, matrix.reshape(4, 3), matrix.view(np.int32), matrix.T]
    assert len({fingerprint(x) for x in different}) == len(different)
    assert fingerprint(matrix[:, ::-1][:, ::-1]) == fingerprint(matrix.copy())
    assert fingerprint(matrix).startswith("3x4-float32-")


def test_fingerprints_hash_every_block_in_order(monkeypatch):
    monkeypatch.setattr(spectra_cache, "_BLOCK", 20)
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)  # 48 bytes: 20, 20, 8
    content = matrix.tobytes()
    parts = [content[:20], content[20:40], content[40:]]
    whole = b"".join(hashlib.sha256(part).digest() for part in parts)
    assert fingerprint(matrix) == f"3x4-float32-{hashlib.sha256(whole).hexdigest()}"
