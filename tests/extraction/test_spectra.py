from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import geometric, spectrum_kernel
from tsd_jax.extraction.spectra import DenseSpectrum, decompose, null_threshold


def test_small_directions_of_a_wide_kernel_are_not_null():
    """What task-specific directions are: small, and not the rounding of large ones."""
    sigma = jnp.asarray(geometric(4096, 10, 1e-4), jnp.float32)
    assert null_threshold(sigma, (4096, 11008), 2.0**-23) < 1e-4
    assert null_threshold(sigma, (4096, 11008), 2.0**-8) < 1e-4
    one = jnp.asarray(np.eye(1, 96)[0], jnp.float32)
    rounded = np.outer(np.linspace(1, 2, 96), np.linspace(3, 5, 150)).astype("f4")
    noise = np.linalg.svd(rounded.astype(float))[1]
    assert 0 < noise[1] / noise[0] < null_threshold(one, (96, 150), 2.0**-23)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=["wide", "tall"])
def test_a_kernel_is_decomposed_from_its_short_side(shape):
    kernel, P, Q = spectrum_kernel(0, shape, geometric(24))
    short = P if shape[0] < shape[1] else Q
    with jax.enable_x64(True):
        got = decompose(jnp.asarray(kernel, jnp.float32))
        assert got.eigenvalues.dtype == got.all_vectors.dtype == jnp.float64
    np.testing.assert_allclose(np.sqrt(got.eigenvalues), geometric(24), rtol=1e-4)
    overlap = np.abs(np.sum(np.asarray(got.all_vectors) * short, 0))
    np.testing.assert_allclose(overlap, 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_products_with_the_eigenvectors(dtype):
    """Of a spectrum just computed, and of one rounded to float32 as a store has it."""
    kernel, _, _ = spectrum_kernel(0, (24, 40), geometric(24))
    columns = np.random.default_rng(1).normal(size=(24, 3))
    with jax.enable_x64(True):
        spectrum = decompose(jnp.asarray(kernel))
        spectrum = DenseSpectrum(*spectrum[:1], spectrum.all_vectors.astype(dtype))
        P = np.asarray(spectrum.all_vectors, np.float64)
        x, indices = jnp.asarray(columns), jnp.asarray([5, 0])
        np.testing.assert_allclose(spectrum.project(x), P.T @ columns, atol=1e-12)
        np.testing.assert_allclose(spectrum.combine(x), P @ columns, atol=1e-12)
        np.testing.assert_array_equal(spectrum.vectors(indices), P[:, [5, 0]])


def test_corrections_solve_their_equation():
    """(lambda_i - G) x_i = r_i among the vectors orthogonal to P_i."""
    kernel, _, _ = spectrum_kernel(0, (24, 40), geometric(24, 10, 0.1))
    residual = np.random.default_rng(2).normal(size=(24, 2))
    with jax.enable_x64(True):
        spectrum = decompose(jnp.asarray(kernel))
        got = np.asarray(spectrum.correct(jnp.asarray(residual), jnp.asarray([3, 20])))
    gram = kernel @ kernel.T
    for column, i in enumerate((3, 20)):
        vector = np.asarray(spectrum.all_vectors)[:, i]
        right = residual[:, column] - vector * (vector @ residual[:, column])
        left = np.asarray(spectrum.eigenvalues)[i] * np.eye(24) - gram
        np.testing.assert_allclose(left @ got[:, column], right, atol=1e-8)
        assert abs(vector @ got[:, column]) < 1e-9


def test_refuses_to_decompose_in_float32():
    with pytest.raises(TypeError, match="enable_x64"):
        decompose(jnp.ones((2, 3)))
