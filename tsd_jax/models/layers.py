"""The parts of a Llama that hold its numerics: the norm and the rotary positions."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def rotary_tables(positions: Array, width: int, theta: float) -> tuple[Array, Array]:
    """Give cos and sin of the angles position · theta^(-2i/H), i < H/2, twice over.

    Args:
      positions: (B, T) integers.
      width: H, the head width.
      theta: base of the wavelengths.

    Returns:
      Two arrays (B, T, 1, H) float32.
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: Array, cos: Array, sin: Array) -> Array:
    """Turn `heads` (B, T, N, H): x cos + [-x₂, x₁] sin, with x₁, x₂ the two halves.

    The pairing of halves is Hugging Face's; the arithmetic is float32 throughout, as
    bfloat16 cannot tell neighbouring angles apart at large positions.
    """
    wide = heads.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = wide * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return turned.astype(heads.dtype)


class RMSNorm(nn.Module):
    """Scale to unit root mean square: x / √(mean x² + ε) · scale, in float32."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis; the result has the compute dtype."""
        scale = self.param(
            "scale", nn.initializers.ones, x.shape[-1:], self.param_dtype
        )
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        unit = wide * lax.rsqrt(power + self.epsilon)
        return (unit * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)
