from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.oracle import geometric, spectrum_kernel
from tsd_jax.core.dora import column_norms, rescaling
from tsd_jax.core.layout import Layout

# Layout of a stored kernel, its shape, and the same as (*batch, in, out).
LAYOUTS = {
    "alone": (Layout(), (6, 9), (6, 9)),
    "scanned": (Layout((0,), (1,), (2,), (0,)), (3, 6, 9), (3, 6, 9)),
    "scanned in the middle, heads": (
        Layout((1,), (2,), (0, 3), (1,)),
        (2, 3, 6, 4),
        (3, 6, 8),
    ),
    "scan of scans": (Layout((0, 1), (2,), (3,), (0, 1)), (2, 3, 6, 5), (2, 3, 6, 5)),
    "experts under a scan": (
        Layout((0, 1), (3,), (2,), (1,)),
        (2, 3, 5, 6),
        (2, 3, 6, 5),
    ),
    "experts alone": (Layout((1,), (0,), (2,)), (6, 3, 5), (3, 6, 5)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_norms_of_stored_kernels(case):
    """Those of K + dK, which is not formed, to float32's rounding."""
    layout, stored, matrices = LAYOUTS[case]
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=stored).astype(np.float32)
    *batch, fan_in, fan_out = matrices
    down = rng.normal(size=(*batch, fan_in, 4)).astype(np.float32)
    up = rng.normal(size=(*batch, 4, fan_out)).astype(np.float32)
    dense = kernel.astype(np.float64).transpose(layout.order).reshape(matrices)
    change = down.astype(np.float64) @ up
    got = column_norms(kernel, down, up, layout=layout)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.linalg.norm(dense + change, axis=-2), rtol=2e-6)
    got = column_norms(kernel, layout=layout)
    np.testing.assert_allclose(got, np.linalg.norm(dense, axis=-2), rtol=1e-6)


def test_bfloat16_kernels_are_summed_in_float32():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(300, 2)), jnp.bfloat16)
    got = column_norms(kernel, layout=Layout())
    want = np.linalg.norm(np.asarray(kernel, np.float64), axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=["wide", "tall"])
def test_what_is_taken_out_and_put_back_cancels(shape):
    """As right after a restart on the largest directions: dK is zero, to rounding."""
    kernel, P, Q = spectrum_kernel(0, shape, geometric(64))
    sigma = geometric(64)[:8]
    root = np.sqrt(sigma)
    down = np.concatenate([P[:, :8] * root, P[:, :8]], 1)
    up = np.concatenate([(root * Q[:, :8]).T, (-sigma * Q[:, :8]).T])
    parts = (x.astype(np.float32) for x in (kernel, down, up))
    got = column_norms(*parts, layout=Layout())
    np.testing.assert_allclose(got, np.linalg.norm(kernel, axis=0), rtol=3e-6)


def test_columns_that_are_zero_are_let_be():
    """0 / 0 is no number, and neither is its gradient."""
    norms, magnitude = jnp.array([2.0, 0.0]), jnp.array([3.0, 0.0])
    np.testing.assert_array_equal(rescaling(magnitude, norms), [1.5, 1.0])
    grads = jax.grad(lambda m: jnp.sum(rescaling(m, norms)))(magnitude)
    np.testing.assert_array_equal(grads, [0.5, 0.0])
