"""Eigenvalues of tridiagonal matrices against LAPACK's, by bisection too (stebz)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tsd_jax.extraction.bisection import count_below, eigenvalues

RNG = np.random.default_rng(0)
SIZE = 121  # one size, one program
MATRICES = {
    "random": (RNG.standard_normal(SIZE), RNG.standard_normal(SIZE - 1)),
    "laplace": (np.full(SIZE, 2.0), np.full(SIZE - 1, -1.0)),
    "wilkinson": (np.abs(np.arange(-60.0, 61)), np.ones(SIZE - 1)),  # pairs 1e-14 apart
    "graded": (np.geomspace(1, 1e-18, SIZE), np.geomspace(1, 1e-18, SIZE - 1)),
    "identity": (np.ones(SIZE), np.zeros(SIZE - 1)),
    "rank deficient": (np.repeat([1.0, 0.0], [30, SIZE - 30]), np.zeros(SIZE - 1)),
    "almost zero": (RNG.random(SIZE) * 1e-20, RNG.random(SIZE - 1) * 1e-25),
    "tail of nothing": (
        np.concatenate([RNG.random(30), RNG.random(SIZE - 30) * 1e-20]),
        RNG.random(SIZE - 1) * 1e-25,
    ),
    "huge": (RNG.standard_normal(SIZE) * 1e150, RNG.standard_normal(SIZE - 1) * 1e150),
    "two rows": (np.array([1.0, 2.0]), np.array([0.5])),
    "zero": (np.zeros(SIZE), np.zeros(SIZE - 1)),
}
SOLVE = jax.jit(eigenvalues)


@pytest.mark.parametrize("name", MATRICES)
def test_equal_those_of_lapack_to_the_last_digits(name):
    diagonal, off = MATRICES[name]
    want = np.asarray(
        scipy.linalg.eigh_tridiagonal(
            diagonal, off, eigvals_only=True, lapack_driver="stebz"
        )
    )
    with jax.enable_x64(True):
        found = np.asarray(SOLVE(diagonal, off))
    assert found.dtype == np.float64
    assert np.all(np.diff(found) >= 0)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-15 * abs(want).max())


def test_counts_are_those_of_the_sorted_eigenvalues():
    diagonal = RNG.uniform(-0.3, 0.3, 100)
    off = RNG.uniform(-0.3, 0.3, 99)
    full = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    shifts = np.linspace(-1, 1, 1500)  # more than are counted at a time
    squares = np.concatenate([[0.0], off**2])
    with jax.enable_x64(True):
        arrays = (jnp.asarray(array) for array in (diagonal, squares, shifts))
        found = np.asarray(count_below(*arrays))
    np.testing.assert_array_equal(
        found, np.searchsorted(np.linalg.eigvalsh(full), shifts)
    )
