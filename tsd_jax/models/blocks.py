"""What one layer of a decoder is made of: attention, feed-forward or experts, norms.

Shapes are named as in `tsd_jax.models.decoder`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import DTypeLike

from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.layers import ACTIVATIONS, RMSNorm, attend, rotate


@struct.dataclass
class Placement:
    """Where this call's tokens stand; the same for every layer.

    cos, sin: (B or 1, T, 1, H) float32. visible: (B, 1, T, S) bool, or None for plain
    causal attention. index: () int32, the cache's first free slot, or None without it.
    near: what stands for (cos, sin) and for visible in windowed layers, where only
    some are windowed; None each where it is the same.
    """

    cos: Array
    sin: Array
    visible: Array | None
    index: Array | None
    near: tuple[tuple[Array, Array] | None, Array | None] = (None, None)

    def of(self, kind: LayerKind) -> Placement:
        """Choose what holds for a layer."""
        (cos, sin), visible = (self.cos, self.sin), self.visible
        tables, window = self.near
        if kind.windowed is not None and tables is not None:
            cos = jnp.where(kind.windowed, tables[0], cos)
            sin = jnp.where(kind.windowed, tables[1], sin)
        if kind.windowed is not None and window is not None:
            assert visible is not None
            visible = jnp.where(kind.windowed, window, visible)
        if kind.turned is not None:
            cos = jnp.where(kind.turned, cos, 1)
            sin = jnp.where(kind.turned, sin, 0)
        return Placement(cos, sin, visible, self.index)


@struct.dataclass
class LayerKind:
    """What differs from layer to layer; None where nothing does.

    windowed: whether its attention has a window. turned: whether its heads turn. Each
    is () bool, or (L,) before the scan.
    """

    windowed: Array | None
    turned: Array | None


class Attention(nn.Module):
    """Attend causally with grouped keys and values and rotary positions."""

    config: DecoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, placement: Placement) -> Array:
        """Map (B, T, D) to (B, T, D); with a cache, attend to all its S slots."""
        config = self.config
        query, key, value = self._project(x)
        if config.qk_norm:
            norm = make_norm(config, self.dtype, self.param_dtype)
            query, key = norm(name="q_norm")(query), norm(name="k_norm")(key)
        query = rotate(query, placement.cos, placement.sin)
        key = rotate(key, placement.cos, placement.sin)
        if placement.index is not None:
            key = self._remember("key", key, placement.index)
            value = self._remember("value", value, placement.index)
        scalar = config.query_pre_attn_scalar
        mixed = attend(
            query,
            key,
            value,
            placement.visible,
            scale=None if scalar is None else scalar**-0.5,
            softcap=config.attn_logit_softcapping,
        )
        return self._dense(config.hidden_size, config.attention_bias, "o_proj")(
            mixed.reshape(*x.shape[:2], -1)
        )

    def _dense(self, features: int, bias: bool, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Return queries (B, T, N, H), and keys and values (B, T, K, H)."""
        config = self.config
        bias = config.attention_bias or config.qkv_bias
        heads = (config.num_attention_heads, *(config.num_key_value_heads,) * 2)
        widths = [number * config.head_dim for number in heads]
        if config.fused_projections:
            fused = self._dense(sum(widths), bias, "qkv_proj")(x)
            flat = jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            flat = [
                self._dense(width, bias, name)(x)
                for width, name in zip(widths, names, strict=True)
            ]
        query, key, value = (
            each.reshape(*x.shape[:2], number, config.head_dim)
            for each, number in zip(flat, heads, strict=True)
        )
        return query, key, value

    def _remember(self, name: str, new: Array, index: Array) -> Array:
        """Write `new` (B, T, K, H) at slot `index`; give all slots (B, S, K, H)."""
        exists = self.has_variable("cache", name)
        slots = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
        if not exists:  # this call only gives the cache its shape
            return new
        slots.value = lax.dynamic_update_slice(
            slots.value, new.astype(slots.value.dtype), (0, index, 0, 0)
        )
        return slots.value.astype(new.dtype)


class MLP(nn.Module):
    """Apply the gated feed-forward: (act(x G) ∘ x U) D.

    Attributes:
      width: of the middle; by default the config's `intermediate_size`.
    """

    config: DecoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    width: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        config = self.config
        width = self.width or config.intermediate_size
        dense = functools.partial(
            nn.Dense,
            use_bias=config.mlp_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        if config.fused_projections:
            fused = dense(2 * width, name="gate_up_proj")(x)
            gate, up = jnp.split(fused, 2, axis=-1)
        else:
            gate = dense(width, name="gate_proj")(x)
            up = dense(width, name="up_proj")(x)
        middle = ACTIVATIONS[config.hidden_act](gate) * up
        return dense(config.hidden_size, name="down_proj")(middle)


class MoE(nn.Module):
    """Mix the feed-forwards of a token's best experts: Σ_e p_e(x) MLP_e(x).

    Every expert sees every token, and the weights of those a token is not sent to are
    zero. It is exact and its shapes are static, but it costs E / k times the work of
    sending each token to its k experts alone, and holds (E, B, T, width).
    """

    config: DecoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        experts = self.config.experts
        assert experts is not None
        settings = (self.config, self.dtype, self.param_dtype)
        weights = self._route(x)
        every = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, None),
            out_axes=0,
            axis_size=experts.num_experts,
        )
        given = every(*settings, experts.intermediate_size, name="experts")(x)
        mixed = jnp.einsum("ebtd,bte->btd", given, weights)
        if experts.shared_intermediate_size is not None:
            shared = MLP(
                *settings, experts.shared_intermediate_size, name="shared_expert"
            )(x)
            mixed += nn.sigmoid(self._dense(1, "shared_expert_gate")(x)) * shared
        return mixed

    def _route(self, x: Array) -> Array:
        """Return every expert's weight for each token, (B, T, E), mostly zero."""
        experts = self.config.experts
        assert experts is not None
        scores = self._dense(experts.num_experts, "gate")(x).astype(jnp.float32)
        best, chosen = lax.top_k(
            jax.nn.softmax(scores, axis=-1), experts.num_experts_per_tok
        )
        if experts.norm_topk_prob:
            best /= jnp.sum(best, axis=-1, keepdims=True)
        spread = jax.nn.one_hot(chosen, experts.num_experts, dtype=best.dtype)
        return jnp.einsum("btk,btke->bte", best, spread).astype(x.dtype)

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )


class Block(nn.Module):
    """Add attention, then feed-forward, each on the normalised stream."""

    config: DecoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Array, placement: Placement, kind: LayerKind
    ) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form a scan wants."""
        config = self.config
        settings = (config, self.dtype, self.param_dtype)
        norm = make_norm(*settings)
        attention = Attention(*settings, name="self_attn")
        mixture = MLP if config.experts is None else MoE
        feed_forward = mixture(*settings, name="mlp")
        placement = placement.of(kind)
        mixed = attention(norm(name="input_layernorm")(x), placement)
        if not config.post_norms:
            x = x + mixed
            return x + feed_forward(norm(name="post_attention_layernorm")(x)), None
        x = x + norm(name="post_attention_layernorm")(mixed)
        mixed = feed_forward(norm(name="pre_feedforward_layernorm")(x))
        return x + norm(name="post_feedforward_layernorm")(mixed), None


def make_norm(
    config: DecoderConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> Callable[..., RMSNorm]:
    """Make the family's norm, but for its name."""
    return functools.partial(
        RMSNorm, config.rms_norm_eps, dtype, param_dtype, config.norm_around_one
    )
