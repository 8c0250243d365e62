from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.trees import random_all, small_spec
from tsd_jax.core.adapter import delta
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.factors import Factors, compress, module_factors, total


def name_of(path: str, index: int | None) -> str:
    return path if index is None else f"{path}.{index}"


def random_factors(rank: int) -> Factors:
    rng = np.random.default_rng(rank)
    down, up = rng.normal(size=(6, rank)), rng.normal(size=(rank, 7))
    return Factors(down.astype(np.float32), up.astype(np.float32))


def test_the_product_is_the_change_of_each_matrix():
    trainable, directions = random_all(0, small_spec("tsd"))
    found = module_factors(trainable.adapters, directions, name_of)
    assert found.keys() == {"k", "stack.0", "stack.1", "stack.2"}
    k = delta(trainable.adapters["k"], directions["k"])
    np.testing.assert_allclose(found["k"].down @ found["k"].up, k, atol=1e-5)
    stack = delta(trainable.adapters["stack"], directions["stack"])
    dense = [found[f"stack.{n}"].down @ found[f"stack.{n}"].up for n in range(3)]
    np.testing.assert_allclose(dense, np.reshape(stack, (3, 6, 7)), atol=1e-5)


def test_no_adapters_and_shared_names_are_refused():
    trainable, directions = random_all(0, small_spec("tsd"))
    with pytest.raises(InputError, match="no adapters"):
        module_factors({}, {}, name_of)
    with pytest.raises(InputError, match="has the module name 'same' already"):
        module_factors(trainable.adapters, directions, lambda path, _: "same")


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_compression_is_the_truncated_svd(rank):
    factors = random_factors(5)
    dense = factors.down.astype(np.float64) @ factors.up.astype(np.float64)
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    small = compress(factors, rank)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(
        small.factors.down @ small.factors.up, best, rtol=1e-5, atol=1e-5
    )
    assert small.factors.rank == rank
    assert small.lost == pytest.approx(np.linalg.norm(s[rank:5]), abs=1e-6)
    assert small.norm == pytest.approx(np.linalg.norm(dense))


def test_what_cannot_be_compressed_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        compress(random_factors(2), 0)
    broken = random_factors(2)
    broken.up[0, 0] = np.nan
    with pytest.raises(InputError, match="diverged"):
        compress(broken, 1)


def test_columns_keep_their_magnitudes():
    factors = random_factors(2)
    magnitude = np.linspace(1, 2, 7, dtype=np.float32)
    weight = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    adapted = factors._replace(magnitude=magnitude).applied(weight)
    plain = factors.applied(weight)
    np.testing.assert_allclose(plain, weight + (factors.down @ factors.up).T)
    np.testing.assert_allclose(np.linalg.norm(adapted, axis=1), magnitude, rtol=1e-6)
    cosines = (adapted * plain).sum(1) / magnitude / np.linalg.norm(plain, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=1e-6)


def test_errors_add_as_of_one_matrix():
    assert total({"a": (3.0, 6.0), "b": (4.0, 8.0)}) == pytest.approx(0.5)
    assert total({"a": (0.0, 0.0)}) == 0
