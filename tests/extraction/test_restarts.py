from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.extraction.test_matrix_launch import oracle, problem
from tsd_jax.core.adapter import merge
from tsd_jax.core.methods import STARTS, get_method
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.restarts import RESTARTS

SHAPES = pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 9)], ids=str)


def launched(name, shape, **reading):
    spec, params, trainable = problem(name, shape)
    spec = type(spec)(spec.kernels, get_method(name, **reading))
    return params, trainable, *launch(params, trainable, spec)


@SHAPES
def test_sigma_and_change_starts_from_what_the_directions_learned(shape):
    """K + sum p_i P_i Q_i^T after launch, of the directions that restart."""
    params, trainable, new, frozen, report = launched("init", shape, start="sigma+p")
    got = np.asarray(merge(params, new, frozen)["k"])
    for index, want in oracle(params, trainable).items():
        adapter = trainable.adapters["k"]
        change = adapter.kernel.scale * np.asarray(adapter.a[index] @ adapter.b[index])
        top = np.asarray(report["k"].indices[index])
        P, Q = want.P[:, top], want.Q[:, top]
        moved = np.diag(P.T @ change @ Q)
        kernel = np.asarray(params["k"][index])
        np.testing.assert_allclose(got[index], kernel + (P * moved) @ Q.T, atol=5e-6)
        assert np.abs(moved).max() > 1e-3
        values = np.abs(want.sigma[top] + moved) / adapter.kernel.scale
        norms = np.linalg.norm(new.adapters["k"].a[index], axis=0)
        np.testing.assert_allclose(norms, np.sqrt(values), rtol=1e-5)


@SHAPES
@pytest.mark.parametrize("name", ["init", "tsd"])
def test_zero_starts_from_the_directions_alone(shape, name):
    params, trainable, new, frozen, report = launched(name, shape, start="zero")
    for index, want in oracle(params, trainable).items():
        top = np.asarray(report["k"].indices[index])[: new.adapters["k"].a.shape[-1]]
        overlap = np.abs(
            np.sum(want.P[:, top] * np.asarray(new.adapters["k"].a[index]), 0)
        )
        np.testing.assert_allclose(overlap, 1, atol=1e-5)
    np.testing.assert_array_equal(new.adapters["k"].b, 0)
    np.testing.assert_array_equal(frozen["k"].offset, 0)
    np.testing.assert_array_equal(merge(params, new, frozen)["k"], params["k"])


@pytest.mark.parametrize(
    ("name", "want"), [("pissa", [0, 1]), ("milora", [5, 4]), ("random", None)]
)
def test_rivals_restart_from_other_directions(name, want):
    """The principal ones, the minor ones, any; the function is the pretrained one."""
    params, _, new, frozen, report = launched(name, (6, 9))
    indices = report["k"].indices.tolist()
    if want is not None:
        assert indices == want
    assert len(set(indices)) == 2
    after = merge(params, new, frozen)["k"]
    np.testing.assert_allclose(after, params["k"], atol=5e-6)
    sigma = np.asarray(report["k"].sigma)[indices]
    product = (
        np.asarray(new.adapters["k"].a @ new.adapters["k"].b)
        * new.adapters["k"].kernel.scale
    )
    values = np.linalg.svd(product)[1][:2]
    np.testing.assert_allclose(values, sorted(sigma)[::-1], rtol=1e-5)


def test_random_directions_hang_on_the_seed_and_the_path():
    spec, params, trainable = problem("random", (3, 6, 9))
    drawn = [
        launch(params, trainable, spec, seed=seed)[2]["k"].indices for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.asarray(drawn[0] != drawn[2]).any()
    assert len({tuple(row) for row in np.asarray(drawn[0]).tolist()}) > 1


def test_dash_along_other_directions():
    """The same directions without the restart: gains alone."""
    spec, params, trainable = problem("dash", (6, 9))
    spec = type(spec)(spec.kernels, get_method("dash", ranking="largest"))
    new, _, report = launch(params, trainable, spec)
    assert report["k"].indices.tolist() == [0, 1, 2, 3]
    assert jnp.array_equal(new.adapters["k"].a, trainable.adapters["k"].a)


def test_there_is_a_restart_for_every_start():
    assert tuple(RESTARTS) == STARTS
