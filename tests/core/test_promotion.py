from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tsd_jax.core.promotion import standard_promotion


def test_types_are_promoted_inside_and_nowhere_else():
    one, other = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)

    def add(a, b):
        return a + b

    with jax.numpy_dtype_promotion("strict"):
        assert standard_promotion(add)(one, other).dtype == jnp.float32
        with pytest.raises(jax.dtypes.TypePromotionError):  # pyright: ignore[reportAttributeAccessIssue]
            add(one, other)
