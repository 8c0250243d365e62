"""The numerics of a decoder: rotary positions, norms and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from tsd_jax.models.rope import RopeScaling

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": nn.gelu,
}


def rotary_tables(
    positions: Array,
    width: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[Array, Array]:
    """Return cos and sin of the angles position · frequency_i, i < H/2, repeated.

    Args:
      positions: (B, T), integers.
      width: H, the rotated part of a head.
      theta: base of the frequencies theta^(-2i/H).
      scaling: changes the frequencies; None for no change.

    Returns:
      (cos, sin), each (B, T, 1, H) float32.
    """
    if scaling is None:
        frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        magnitude = 1.0
    else:
        length = jnp.max(positions) + 1
        frequencies = scaling.frequencies(width, theta, length)
        magnitude = scaling.magnitude
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(heads: Array, cos: Array, sin: Array) -> Array:
    """Return x cos + [-x₂, x₁] sin, where x₁ and x₂ are the two halves of each head.

    Halves are paired as in Hugging Face's models. The arithmetic is float32 throughout:
    bfloat16 cannot tell neighbouring angles apart at large positions.

    Args:
      heads: x, (B, T, N, H).
      cos: (B or 1, T, 1, W) float32; where W < H, the rest of a head is not rotated.
      sin: like `cos`.
    """
    width = cos.shape[-1]
    x = heads[..., :width].astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    rotated = x * cos + jnp.concatenate([-second, first], axis=-1) * sin
    rotated = rotated.astype(heads.dtype)
    if width == heads.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, heads[..., width:]], axis=-1)


class RMSNorm(nn.Module):
    """Root mean square normalisation: x / √(mean x² + ε) · scale, in float32.

    Attributes:
      epsilon: ε.
      dtype: of the result.
      param_dtype: of the scale.
      around_one: the parameter is scale - 1, not scale (Gemma).
    """

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    around_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        start = nn.initializers.zeros if self.around_one else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:], self.param_dtype)
        if self.around_one:
            scale = 1 + scale.astype(jnp.float32)
        exact = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
        unit = exact * lax.rsqrt(power + self.epsilon)
        return (unit * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


def soft_cap(x: Array, limit: float) -> Array:
    """Return limit · tanh(x / limit)."""
    return limit * jnp.tanh(x / limit)


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Return softmax(soft_cap(query · key · scale)) · value, softmax in float32.

    Args:
      query: (B, T, N, H).
      key: (B, S, K, H), with N a multiple of K.
      value: (B, S, K, H).
      mask: (B, 1, T, S) bool; None for plain causal attention over T = S.
      scale: by default 1/√H.
      softcap: limit of the scores; None for no limit.

    Returns:
      (B, T, N, H).
    """
    if softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=mask is None
        )
    batch, length, number, width = query.shape
    if mask is None:
        mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32
    )
    scores = soft_cap(scores * (width**-0.5 if scale is None else scale), softcap)
    # A finite minimum: the gradient of a row of -inf would be NaN.
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(
        batch, length, number, width
    )
