from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.casts import cast, is_finite

WEIGHTS = np.array([1.0, -6e4, 3e-8])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_rounded(dtype):
    np.testing.assert_array_equal(
        cast(WEIGHTS, dtype, "w"), WEIGHTS.astype(jnp.dtype(dtype))
    )


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "told"),
    [
        (1e5, "bfloat16", "float16", "'w' holds values that are too large for float16"),
        (-1e5, "float32", "float16", "too large for float16: choose another dtype"),
        (3.4e38, "float32", "bfloat16", "too large for bfloat16"),
        (np.nan, "float32", "float32", "'w' holds values that are not finite"),
        (np.inf, "bfloat16", "float32", "not finite"),
    ],
)
def test_values_that_would_be_lost_are_refused(value, stored, dtype, told):
    values = np.append(WEIGHTS, value).astype(jnp.dtype(stored))
    with pytest.raises(InputError, match=told):
        cast(values, dtype, "w")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 6e4, -6e4, 0.0])
def test_finite_is_what_numpy_calls_finite(dtype, value):
    values = np.append(WEIGHTS, value).astype(jnp.dtype(dtype))
    assert is_finite(values) == bool(np.isfinite(value))
    assert is_finite(values[:0])
