from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import geometric
from tsd_jax.extraction.tridiagonal import tridiagonalize

SIZE = 60


def symmetric(values, seed=0):
    """Make a symmetric matrix with these eigenvalues; return it with its vectors."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return (vectors * values) @ vectors.T, vectors


def reduced(matrix):
    with jax.enable_x64(True):
        return jax.jit(tridiagonalize)(jnp.asarray(np.tril(matrix)))


def aligned(got, want):
    return np.asarray(got) * np.sign(np.sum(np.asarray(got) * want, 0))


def test_eigenvalues_and_what_the_eigenvectors_see():
    values = geometric(SIZE, 100, 1e-4)
    matrix, vectors = symmetric(values)
    columns = np.random.default_rng(1).normal(size=(SIZE, 3))
    form = reduced(matrix)
    np.testing.assert_allclose(form.eigenvalues, values, atol=1e-13 * 100)
    with jax.enable_x64(True):
        seen = form.project(jnp.asarray(columns))
    np.testing.assert_allclose(np.abs(seen), np.abs(vectors.T @ columns), atol=1e-9)


@pytest.mark.parametrize("indices", [[0, 1, 2], [57, 58, 59], [3, 30, 59]], ids=str)
def test_chosen_eigenvectors(indices):
    matrix, vectors = symmetric(geometric(SIZE, 100, 1e-4))
    with jax.enable_x64(True):
        got = reduced(matrix).vectors(jnp.asarray(indices))
    want = vectors[:, indices]
    np.testing.assert_allclose(aligned(got, want), want, atol=1e-9)


def test_a_matrix_that_falls_apart():
    """Already tridiagonal, with a zero beside its diagonal: two blocks."""
    matrix = np.diag([5.0, 4.0, 3.0, 2.0]) + np.diag([1.0, 0, 0.5], -1)
    matrix = np.tril(matrix) + np.tril(matrix, -1).T
    want_values, want = np.linalg.eigh(matrix)
    form = reduced(matrix)
    np.testing.assert_allclose(form.eigenvalues, want_values[::-1], atol=1e-14)
    with jax.enable_x64(True):
        got = form.vectors(jnp.arange(4))
    np.testing.assert_allclose(aligned(got, want[:, ::-1]), want[:, ::-1], atol=1e-12)


def test_corrections_solve_their_equation():
    """(lambda_i - G) x_i = r_i among the vectors orthogonal to P_i."""
    values = geometric(SIZE, 100, 1e-2)
    matrix, vectors = symmetric(values)
    indices = np.array([2, 40, 59])
    residual = np.random.default_rng(2).normal(size=(SIZE, 3))
    want = np.zeros_like(residual)
    for column, i in enumerate(indices):
        others = np.arange(SIZE) != i
        shares = vectors.T @ residual[:, column]
        shares[others] /= values[i] - values[others]
        shares[i] = 0
        want[:, column] = vectors @ shares
    with jax.enable_x64(True):
        got = reduced(matrix).correct(jnp.asarray(residual), jnp.asarray(indices))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_repeated_eigenvalues_are_told():
    def distinct(values, used=slice(None)):
        marks = np.zeros(len(values), bool)
        marks[used] = True
        with jax.enable_x64(True):
            return bool(reduced(symmetric(values)[0]).distinct(jnp.asarray(marks)))

    apart = geometric(20, 10, 1)
    assert distinct(apart)
    assert not distinct(np.sort([*apart[:-1], apart[4]])[::-1])
    assert not distinct(np.ones(20))
    null = np.array([3.0, 2.0, 1.0, *np.zeros(17)])
    assert not distinct(null)
    assert distinct(null, slice(3))
    assert not distinct(np.zeros(20), slice(0))
