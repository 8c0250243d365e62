from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.extraction.blocked import BlockedMatrix

# A block and a rest on both sides; less than one; several rows of Gram blocks.
SHAPES = [(70, 150), (150, 70), (5, 9), (600, 2100), (2100, 600)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_widened_matrix(shape, dtype):
    rng = np.random.default_rng(0)
    stored = jnp.asarray(rng.normal(size=shape), dtype)
    whole = np.asarray(stored.astype(jnp.float32), np.float64)
    whole = whole.T if shape[0] > shape[1] else whole
    n, m = whole.shape
    x, v = rng.normal(size=(m, 3)), rng.normal(size=(n, 3))
    with jax.enable_x64(True):
        wide = BlockedMatrix(stored)
        assert wide.shape == (n, m)
        np.testing.assert_allclose(
            jax.jit(lambda w, x: w.times(x))(wide, x), whole @ x, rtol=1e-11, atol=1e-11
        )
        np.testing.assert_allclose(
            jax.jit(lambda w, v: w.transposed_times(v))(wide, v),
            whole.T @ v,
            rtol=1e-11,
            atol=1e-11,
        )
        lower = np.tril(jax.jit(lambda w: w.gram())(wide))
    np.testing.assert_allclose(lower, np.tril(whole @ whole.T), rtol=1e-11, atol=1e-11)
