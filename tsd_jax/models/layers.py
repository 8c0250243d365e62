"""The parts that hold a decoder's numerics: positions, norms and attention."""

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
    """Return cos and sin of the angles position · frequency_i, i < H/2, twice over.

    Args:
      positions: (B, T) integers.
      width: H, the width that is turned.
      theta: base of the wavelengths.
      scaling: of the frequencies; by default none, theta^(-2i/H).

    Returns:
      Two arrays (B, T, 1, H) float32.
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
    """Turn `heads` (B, T, N, H): x cos + [-x₂, x₁] sin, with x₁, x₂ the two halves.

    Where the tables are narrower than H, what is past them stays as it is. The pairing
    of halves is Hugging Face's; the arithmetic is float32 throughout, as bfloat16
    cannot tell neighbouring angles apart at large positions.
    """
    width = cos.shape[-1]
    wide = heads[..., :width].astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    turned = wide * cos + jnp.concatenate([-second, first], axis=-1) * sin
    turned = turned.astype(heads.dtype)
    if width == heads.shape[-1]:
        return turned
    return jnp.concatenate([turned, heads[..., width:]], axis=-1)


class RMSNorm(nn.Module):
    """Scale to unit root mean square: x / √(mean x² + ε) · scale, in float32.

    Attributes:
      epsilon: ε. dtype: of the result. param_dtype: of the scale.
      around_one: keep the scale's distance from 1 as the parameter (Gemma).
    """

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    around_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis; the result has the compute dtype."""
        start = nn.initializers.zeros if self.around_one else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:], self.param_dtype)
        if self.around_one:
            scale = 1 + scale.astype(jnp.float32)
        wide = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        unit = wide * lax.rsqrt(power + self.epsilon)
        return (unit * jnp.expand_dims(scale, range(x.ndim - 1))).astype(self.dtype)


def cap(x: Array, limit: float) -> Array:
    """Bound `x` softly: limit · tanh(x / limit)."""
    return limit * jnp.tanh(x / limit)


def attend(
    query: Array,
    key: Array,
    value: Array,
    visible: Array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """Mix values by softmax(cap(query · key · scale)), in float32.

    Args:
      query: (B, T, N, H). key, value: (B, S, K, H), N a multiple of K.
      visible: (B, 1, T, S) bool, or None for plain causal attention over T = S.
      scale: by default 1/√H. softcap: limit of the scores; None for none.

    Returns:
      (B, T, N, H).
    """
    if softcap is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=visible, scale=scale, is_causal=visible is None
        )
    batch, length, number, width = query.shape
    if visible is None:
        visible = jnp.tril(jnp.ones((1, 1, length, length), bool))
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32
    )
    scores = cap(scores * (width**-0.5 if scale is None else scale), softcap)
    # A finite floor: a gradient through a row of -inf would be NaN.
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(
        batch, length, number, width
    )
