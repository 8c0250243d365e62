"""The parts of a decoder layer: attention, feed-forward, experts and norms.

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

from tsd_jax.models.base import ModelPart
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.layers import ACTIVATIONS, RMSNorm, attend, rotate


@struct.dataclass
class LayerKind:
    """What may differ between layers; None where all layers agree.

    Attributes:
      windowed: whether attention is limited to a window; () bool, or (L,) for all
        layers.
      rotary: whether heads use rotary positions; () bool, or (L,) for all layers.
    """

    windowed: Array | None
    rotary: Array | None


@struct.dataclass
class AttentionInputs:
    """What attention needs besides the hidden states; shared by all layers.

    Attributes:
      cos: rotary table, (B or 1, T, 1, H) float32.
      sin: rotary table, (B or 1, T, 1, H) float32.
      mask: which slots each token attends to, (B, 1, T, S) bool; None for plain causal
        attention.
      index: the cache's first free slot, () int32; None without a cache.
      window_tables: (cos, sin) of windowed layers; None where they are the same.
      window_mask: the mask of windowed layers; None where it is the same.
    """

    cos: Array
    sin: Array
    mask: Array | None
    index: Array | None
    window_tables: tuple[Array, Array] | None = None
    window_mask: Array | None = None

    def select(self, kind: LayerKind) -> AttentionInputs:
        """Return the inputs of one layer."""
        cos, sin, mask = self.cos, self.sin, self.mask
        if kind.windowed is not None and self.window_tables is not None:
            cos = jnp.where(kind.windowed, self.window_tables[0], cos)
            sin = jnp.where(kind.windowed, self.window_tables[1], sin)
        if kind.windowed is not None and self.window_mask is not None:
            assert mask is not None
            mask = jnp.where(kind.windowed, self.window_mask, mask)
        if kind.rotary is not None:
            cos = jnp.where(kind.rotary, cos, 1)
            sin = jnp.where(kind.rotary, sin, 0)
        return AttentionInputs(cos, sin, mask, self.index)


class Attention(ModelPart):
    """Causal attention with grouped keys and values, and rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, inputs: AttentionInputs) -> Array:
        """Map (B, T, D) to (B, T, D); with a cache, attend to all of its S slots."""
        config = self.config
        query, key, value = self._project(x)
        if config.qk_norm:
            norm = make_norm(*self.settings)
            query, key = norm(name="q_norm")(query), norm(name="k_norm")(key)
        query = rotate(query, inputs.cos, inputs.sin)
        key = rotate(key, inputs.cos, inputs.sin)
        if inputs.index is not None:
            key = self._update_cache("key", key, inputs.index)
            value = self._update_cache("value", value, inputs.index)
        scalar = config.query_pre_attn_scalar
        mixed = attend(
            query,
            key,
            value,
            inputs.mask,
            scale=None if scalar is None else scalar**-0.5,
            softcap=config.attn_logit_softcapping,
        )
        project = self.dense(
            config.hidden_size, "o_proj", use_bias=config.attention_bias
        )
        return project(mixed.reshape(*x.shape[:2], -1))

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        """Return queries (B, T, N, H), and keys and values (B, T, K, H)."""
        config = self.config
        bias = config.attention_bias or config.qkv_bias
        heads = (config.num_attention_heads, *(config.num_key_value_heads,) * 2)
        widths = [number * config.head_dim for number in heads]
        if config.fused_projections:
            fused = self.dense(sum(widths), "qkv_proj", use_bias=bias)(x)
            flat = jnp.split(fused, [widths[0], widths[0] + widths[1]], axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            flat = [
                self.dense(width, name, use_bias=bias)(x)
                for width, name in zip(widths, names, strict=True)
            ]
        query, key, value = (
            each.reshape(*x.shape[:2], number, config.head_dim)
            for each, number in zip(flat, heads, strict=True)
        )
        return query, key, value

    def _update_cache(self, name: str, new: Array, index: Array) -> Array:
        """Write `new` (B, T, K, H) at slot `index`; return all slots (B, S, K, H)."""
        exists = self.has_variable("cache", name)
        slots = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
        if not exists:  # this call only creates the cache
            return new
        slots.value = lax.dynamic_update_slice(
            slots.value, new.astype(slots.value.dtype), (0, index, 0, 0)
        )
        return slots.value.astype(new.dtype)


class MLP(ModelPart):
    """The gated feed-forward network: (act(x G) ∘ x U) D.

    Attributes:
      width: of the hidden layer; by default `config.intermediate_size`.
    """

    config: DecoderConfig
    width: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        config = self.config
        width = self.width or config.intermediate_size
        dense = functools.partial(self.dense, use_bias=config.mlp_bias)
        if config.fused_projections:
            fused = dense(2 * width, "gate_up_proj")(x)
            gate, up = jnp.split(fused, 2, axis=-1)
        else:
            gate = dense(width, "gate_proj")(x)
            up = dense(width, "up_proj")(x)
        hidden = ACTIVATIONS[config.hidden_act](gate) * up
        return dense(config.hidden_size, "down_proj")(hidden)


class MoE(ModelPart):
    """A mixture of experts: Σ_e p_e(x) MLP_e(x) over the best experts of each token.

    Every expert computes every token, with weight zero where the token is not routed to
    it. This is exact and has static shapes, but costs E / k times the work of sending
    each token to its k experts only, and holds (E, B, T, width).
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        experts = self.config.experts
        assert experts is not None
        weights = self._route(x)
        all_experts = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, None),
            out_axes=0,
            axis_size=experts.num_experts,
        )
        outputs = all_experts(
            *self.settings, experts.intermediate_size, name="experts"
        )(x)
        mixed = jnp.einsum("ebtd,bte->btd", outputs, weights)
        width = experts.shared_intermediate_size
        if width is not None:
            shared = MLP(*self.settings, width, name="shared_expert")(x)
            gate = self.dense(1, "shared_expert_gate", use_bias=False)
            mixed += nn.sigmoid(gate(x)) * shared
        return mixed

    def _route(self, x: Array) -> Array:
        """Return the weight of every expert for each token, (B, T, E), mostly zero."""
        experts = self.config.experts
        assert experts is not None
        router = self.dense(experts.num_experts, "gate", use_bias=False)
        scores = router(x).astype(jnp.float32)
        best, chosen = lax.top_k(
            jax.nn.softmax(scores, axis=-1), experts.num_experts_per_tok
        )
        if experts.norm_topk_prob:
            best /= jnp.sum(best, axis=-1, keepdims=True)
        one_hot = jax.nn.one_hot(chosen, experts.num_experts, dtype=best.dtype)
        return jnp.einsum("btk,btke->bte", best, one_hot).astype(x.dtype)


class Block(ModelPart):
    """One layer: attention, then feed-forward, each normalised and added to x."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, inputs: AttentionInputs, kind: LayerKind
    ) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form that a scan expects."""
        config = self.config
        norm = make_norm(*self.settings)
        attention = Attention(*self.settings, name="self_attn")
        network = MLP if config.experts is None else MoE
        feed_forward = network(*self.settings, name="mlp")
        inputs = inputs.select(kind)
        mixed = attention(norm(name="input_layernorm")(x), inputs)
        if not config.post_norms:
            x = x + mixed
            return x + feed_forward(norm(name="post_attention_layernorm")(x)), None
        x = x + norm(name="post_attention_layernorm")(mixed)
        mixed = feed_forward(norm(name="pre_feedforward_layernorm")(x))
        return x + norm(name="post_feedforward_layernorm")(mixed), None


def make_norm(
    config: DecoderConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> Callable[..., RMSNorm]:
    """Return the constructor of the family's norm, all but its name bound."""
    return functools.partial(
        RMSNorm, config.rms_norm_eps, dtype, param_dtype, config.norm_around_one
    )
