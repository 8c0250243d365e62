from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.oracle import geometric, spectrum_kernel
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.refinement import column_signs, complete_null, refine
from tsd_jax.extraction.spectra import DenseSpectrum, decompose


def test_rounded_eigenvectors_become_exact():
    """From float32 vectors to those of the matrix itself, also at small sigma."""
    kernel, P, _ = spectrum_kernel(0, (30, 50), geometric(30, 10, 1e-2))
    with jax.enable_x64(True):
        matrix = jnp.asarray(kernel)
        found = decompose(matrix)
        rounded = found.all_vectors.astype(jnp.float32)
        spectrum = DenseSpectrum(found.eigenvalues, rounded)
        got = refine(spectrum, BlockedMatrix(matrix), jnp.asarray([0, 12, 29]))
    want = P[:, [0, 12, 29]]
    before = np.abs(np.sum(np.asarray(rounded)[:, [0, 12, 29]] * want, 0))
    assert np.abs(before - 1).max() > 1e-9, "otherwise there was nothing to refine"
    np.testing.assert_allclose(np.abs(got.T @ want), np.eye(3), atol=1e-10)
    np.testing.assert_allclose(got.T @ got, np.eye(3), atol=1e-12)


def test_null_columns_are_filled_from_the_null_space():
    sigma = np.where(np.arange(12) < 5, geometric(12), 0.0)
    kernel, _, Q = spectrum_kernel(1, (12, 20), sigma)
    null = np.array([False, True, False, True])
    long = np.where(null, 0.0, Q[:, [0, 6, 2, 7]])
    with jax.enable_x64(True):
        matrix = jnp.asarray(kernel)
        got = complete_null(
            decompose(matrix),
            BlockedMatrix(matrix),
            jnp.asarray(long),
            jnp.asarray(null),
        )
    got = np.asarray(got)
    np.testing.assert_allclose(got.T @ got, np.eye(4), atol=1e-9)
    np.testing.assert_array_equal(got[:, ~null], long[:, ~null])
    np.testing.assert_allclose(kernel @ got[:, null], 0, atol=1e-9)


def test_the_largest_entry_decides_the_sign():
    vectors = np.array([[0.1, -0.9, 0.5], [0.2, 0.3, -0.4]])
    np.testing.assert_array_equal(column_signs(jnp.asarray(vectors)), [[1, -1, 1]])
