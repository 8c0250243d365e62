from __future__ import annotations

import io

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.extraction.launch import Ranking
from tsd_jax.storage.directions_file import read_directions, write_rankings


def test_rankings_are_plain_arrays(tmp_path):
    """One matrix a row, stacked or not; plain arrays under the kernel's path."""
    one = Ranking(jnp.arange(3.0), jnp.arange(3.0) + 5, jnp.array([2, 0], jnp.int32))
    stack = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
    report = {
        "head/kernel": one,
        "layers/q/kernel": Ranking(stack, -stack, np.zeros((2, 2, 2), np.int32)),
    }
    write_rankings(tmp_path / "directions.npz", report)
    with np.load(tmp_path / "directions.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {
            f"{kernel}/{field}"
            for kernel in report
            for field in ("sigma", "rates", "indices")
        }
        np.testing.assert_array_equal(arrays["head/kernel/sigma"], [[0, 1, 2]])
        np.testing.assert_array_equal(arrays["head/kernel/rates"], [[5, 6, 7]])
        np.testing.assert_array_equal(arrays["head/kernel/indices"], [[2, 0]])
        assert arrays["head/kernel/indices"].dtype == np.int32
        np.testing.assert_array_equal(
            arrays["layers/q/kernel/sigma"], np.arange(12).reshape(4, 3)
        )
        assert arrays["layers/q/kernel/indices"].shape == (4, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["directions.npz"]


def test_directions_are_read_as_a_run_writes_them(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "directions.npz"
    one = Ranking(*(jnp.asarray(rng.normal(size=n)) for n in (5, 5, 2)))
    many = Ranking(*(jnp.asarray(rng.normal(size=(3, n))) for n in (4, 4, 2)))
    write_rankings(path, {"lm_head/kernel": one, "layers/up/kernel": many})
    spectra = read_directions(path)
    assert list(spectra) == ["lm_head/kernel", "layers/up/kernel"]
    np.testing.assert_array_equal(spectra["lm_head/kernel"].sigma, one.sigma[None])
    np.testing.assert_array_equal(spectra["layers/up/kernel"].rates, many.rates)
    np.testing.assert_array_equal(spectra["layers/up/kernel"].indices, many.indices)
    assert spectra["layers/up/kernel"].used is None
    assert spectra["layers/up/kernel"].gains.all()


def test_how_many_gains_a_matrix_uses_is_read(tmp_path):
    path = tmp_path / "directions.npz"
    zeros = jnp.zeros((2, 3, 4))
    used = jnp.asarray([[1, 2, 3], [4, 1, 2]])[..., None]
    ranking = Ranking(zeros, zeros, zeros.astype(jnp.int32), used)
    write_rankings(path, {"experts/up/kernel": ranking})
    seen = read_directions(path)["experts/up/kernel"]
    np.testing.assert_array_equal(seen.used, [1, 2, 3, 4, 1, 2])
    np.testing.assert_array_equal(seen.gains.sum(1), [1, 2, 3, 4, 1, 2])
    assert seen.gains[1].tolist() == [True, True, False, False]


def test_bad_directions(tmp_path):
    path = tmp_path / "directions.npz"
    with pytest.raises(InputError, match="does not exist; give the directions"):
        read_directions(path)
    np.savez(path, allow_pickle=False, **{"up/kernel/sigma": np.ones(3)})
    with pytest.raises(InputError, match=r"not the directions\.npz of a run \(.*rates"):
        read_directions(path)
    single = io.BytesIO()
    np.save(single, np.ones(3))
    for content in (b"", b"PK\x03\x04 cut off", b"text", single.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not the directions\.npz of a run"):
            read_directions(path)
