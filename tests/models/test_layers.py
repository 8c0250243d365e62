from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.models.layers import RMSNorm, rotary_tables, rotate

RNG = np.random.default_rng(0)


def turned(heads, positions, theta):
    """Turn halves as complex numbers, in float64."""
    half = heads.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    turn = np.exp(1j * positions[..., None, None] * frequencies)
    pairs = (heads[..., :half] + 1j * heads[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_a_complex_product(theta):
    heads = RNG.normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 0, 90, 2]])
    found = rotate(jnp.asarray(heads), *rotary_tables(jnp.asarray(positions), 8, theta))
    np.testing.assert_allclose(found, turned(heads, positions, theta), atol=2e-5)


def test_rotation_of_bfloat16_is_exact_to_its_rounding_at_far_positions():
    heads = jnp.asarray(RNG.normal(size=(1, 2, 1, 64)), jnp.bfloat16)
    positions = jnp.asarray([[4001, 4002]])
    found = rotate(heads, *rotary_tables(positions, 64, 10000.0))
    expected = turned(np.asarray(heads, np.float64), np.asarray(positions), 10000.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float64), expected, rtol=2**-8, atol=2e-3
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_is_computed_in_float32(dtype):
    x = jnp.asarray(RNG.normal(size=(2, 3, 300)) * 20, dtype)
    scale = jnp.asarray(RNG.normal(size=300), jnp.float32)
    norm = RMSNorm(epsilon=1e-3, dtype=dtype, param_dtype=jnp.float32)
    found = norm.apply({"params": {"scale": scale}}, x)
    assert isinstance(found, jnp.ndarray)
    wide = np.asarray(x, np.float64)
    power = (wide**2).mean(-1, keepdims=True)
    expected = wide / np.sqrt(power + 1e-3) * np.asarray(scale, np.float64)
    assert found.dtype == dtype
    # One rounding, at the end: half a unit in the last place of the result.
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        expected,
        rtol=2**-8 if dtype == jnp.bfloat16 else 1e-6,
    )
