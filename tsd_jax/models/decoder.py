"""One configurable decoder in Linen, for every family, that knows nothing of adapters.

The parameter tree, with the layers stacked on a leading axis L by the scan:

    embed_tokens/embedding                              (V, D)
    layers/input_layernorm/scale                        (L, D)
    layers/self_attn/{q,k,v,o}_proj/{kernel,bias}       (L, in, out), (L, out)
    layers/self_attn/{q,k}_norm/scale                   (L, H), where it has them
    layers/post_attention_layernorm/scale               (L, D)
    layers/{pre,post}_feedforward_layernorm/scale       (L, D), where it has them
    layers/mlp/{gate,up,down}_proj/{kernel,bias}        (L, in, out), (L, out)
    norm/scale                                          (D,)
    lm_head/kernel                                      (D, V), where it is not tied

With fused projections, `self_attn/qkv_proj` and `mlp/gate_up_proj` take the place of
their parts. With experts, E of them to a layer, the feed-forward is

    layers/mlp/gate/kernel                                      (L, D, E), the router
    layers/mlp/experts/{gate,up,down}_proj/kernel               (L, E, in, out)
    layers/mlp/shared_expert/{gate,up,down}_proj/kernel         (L, in, out)
    layers/mlp/shared_expert_gate/kernel                        (L, D, 1)

Without the scan the layers are `layers_0`, `layers_1`, ... and have no axis L.

Shapes are named B (batch), T (tokens of this call), S (tokens attended to),
N (query heads), K (key and value heads), H (head width), D (hidden), V (vocabulary).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.layers import (
    ACTIVATIONS,
    RMSNorm,
    attend,
    cap,
    rotary_tables,
    rotate,
)

_WIDENING = r"(q|k|v|qkv|gate|up|gate_up)_proj"
_NARROWING = r"(o|down)_proj"


def _stacked(axes: int, *spec: str) -> PartitionSpec:
    """Leave the first axes whole, which stack matrices."""
    return PartitionSpec(*(None,) * axes, *spec)


# Inner axes on fsdp, heads and feed-forward columns on tensor: a block then needs one
# reduction over `tensor` after o_proj and one after down_proj. First full match wins.
DECODER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (rf"layers/mlp/experts/{_WIDENING}/kernel", _stacked(2, "fsdp", "tensor")),
    (rf"layers/mlp/experts/{_NARROWING}/kernel", _stacked(2, "tensor", "fsdp")),
    (rf"layers/.*/{_WIDENING}/kernel", _stacked(1, "fsdp", "tensor")),
    (rf"layers/.*/{_NARROWING}/kernel", _stacked(1, "tensor", "fsdp")),
    (rf"layers_\d+/mlp/experts/{_WIDENING}/kernel", _stacked(1, "fsdp", "tensor")),
    (rf"layers_\d+/mlp/experts/{_NARROWING}/kernel", _stacked(1, "tensor", "fsdp")),
    (rf"layers_\d+/.*/{_WIDENING}/kernel", _stacked(0, "fsdp", "tensor")),
    (rf"layers_\d+/.*/{_NARROWING}/kernel", _stacked(0, "tensor", "fsdp")),
    (r".*", PartitionSpec()),
)


@struct.dataclass
class _Placement:
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

    def of(self, kind: _Kind) -> _Placement:
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
        return _Placement(cos, sin, visible, self.index)


@struct.dataclass
class _Kind:
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
    def __call__(self, x: Array, placement: _Placement) -> Array:
        """Map (B, T, D) to (B, T, D); with a cache, attend to all its S slots."""
        config = self.config
        query, key, value = self._project(x)
        if config.qk_norm:
            norm = _norm(config, self.dtype, self.param_dtype)
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
        """Give queries (B, T, N, H), and keys and values (B, T, K, H)."""
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
        """Give every expert's weight for each token, (B, T, E), mostly zero."""
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
        self, x: Array, placement: _Placement, kind: _Kind
    ) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form a scan wants."""
        config = self.config
        settings = (config, self.dtype, self.param_dtype)
        norm = _norm(*settings)
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


class Decoder(nn.Module):
    """Predict the next token at every position.

    Attributes:
      config: the numbers that shape the model.
      dtype: of the computation; norms, rotations, softmax and logits are float32.
      param_dtype: of the parameters that `init` makes.
      scan_layers: stack the layers' parameters and compile one block, not L.
      remat: keep only each block's input for the gradient and recompute the rest.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    scan_layers: bool = True
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        *,
        decode: bool = False,
    ) -> Array:
        """Give the logits of the token after each one.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32; by default counted along the tokens `mask` keeps.
          mask: (B, T) bool, True at real tokens; padding may stand on either side.
          decode: let these tokens follow those of the calls before, whose keys and
            values the collection "cache" holds (it must be mutable). A call without
            one makes it, empty, with as many slots as it has tokens; how many of them
            are free is the caller's to count.

        Returns:
          (B, T, V) float32; rows of padding are finite and mean nothing.
        """
        config = self.config
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embed_tokens",
        )
        placement = self._place(tokens, positions, mask, decode)
        x = embed(tokens)
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.hidden_size), self.dtype)
        x = self._run_layers(x, placement)
        x = _norm(config, self.dtype, self.param_dtype)(name="norm")(x)
        # Logits leave the product in float32: bfloat16 would round them to 3 digits.
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if config.tie_word_embeddings:
            table = jnp.asarray(embed.embedding, self.dtype)
            logits = product(x, table, (((2,), (1,)), ((), ())))
        else:
            logits = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general=product,
                name="lm_head",
            )(x)
        limit = config.final_logit_softcapping
        return logits if limit is None else cap(logits, limit)

    def _run_layers(self, x: Array, placement: _Placement) -> Array:
        """Send (B, T, D) through all blocks."""
        settings = (self.config, self.dtype, self.param_dtype)
        number = self.config.num_hidden_layers
        kinds = self._kinds()
        block: Any = Block
        if self.remat:
            # In a scan nothing can be merged across iterations, so no barrier.
            block = nn.remat(Block, prevent_cse=not self.scan_layers)
        if not self.scan_layers:
            for layer in range(number):
                kind = jax.tree.map(lambda each, layer=layer: each[layer], kinds)
                x, _ = block(*settings, name=f"layers_{layer}")(x, placement, kind)
            return x
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, 0)),  # the placement is not scanned over
            length=number,
        )
        x, _ = scanned(*settings, name="layers")(x, placement, kinds)
        return x

    def _kinds(self) -> _Kind:
        """Gather over the layers what is not the same in all of them."""

        def gathered(each: tuple[bool, ...]) -> Array | None:
            return jnp.asarray(each) if len({*each}) > 1 else None

        return _Kind(
            windowed=gathered(self.config.windowed),
            turned=gathered(self.config.rope_layers),
        )

    def _place(
        self, tokens: Array, positions: Array | None, mask: Array | None, decode: bool
    ) -> _Placement:
        """Find positions, visible slots and the cache's index of `tokens` (B, T)."""
        known, index = mask, None
        if decode:
            real = jnp.ones(tokens.shape, bool) if mask is None else mask
            known, index = self._remember_mask(real)
        length = tokens.shape[1]
        start = jnp.zeros((), jnp.int32) if index is None else index
        if known is None:
            counted = jnp.arange(length, dtype=jnp.int32)[None, :]
        else:
            counted = jnp.maximum(jnp.cumsum(known, axis=1, dtype=jnp.int32) - 1, 0)
            counted = lax.dynamic_slice_in_dim(counted, start, length, axis=1)
        positions = counted if positions is None else positions
        wide, near = self._tables(positions), self._near_tables(positions)
        window = self._window(known, start, length)
        if known is None and window is not None:
            known = jnp.ones((1, length), bool)
        visible = None if known is None else _visible(known, start, length)
        if all(self.config.windowed):
            wide, near = wide if near is None else near, None
            visible, window = visible if window is None else window, None
        return _Placement(*wide, visible, index, (near, window))

    def _tables(self, positions: Array) -> tuple[Array, Array]:
        """Give cos and sin for `positions` (B or 1, T)."""
        config = self.config
        if config.rope_layers and not any(config.rope_layers):
            ones = jnp.ones((*positions.shape, 1, config.rotary_width), jnp.float32)
            return ones, 0 * ones
        return rotary_tables(
            positions, config.rotary_width, config.rope_theta, config.rope_scaling
        )

    def _near_tables(self, positions: Array) -> tuple[Array, Array] | None:
        """Give those of windowed layers, where they have a theta of their own."""
        theta = self.config.rope_local_theta
        if theta is None or not any(self.config.windowed):
            return None
        return rotary_tables(positions, self.config.rotary_width, theta)

    def _window(self, known: Array | None, start: Array, length: int) -> Array | None:
        """Tell what windowed layers see; None where no window is left behind."""
        window = self.config.sliding_window
        slots = length if known is None else known.shape[1]
        if not any(self.config.windowed) or window is None or window >= slots:
            return None
        known = jnp.ones((1, length), bool) if known is None else known
        return _visible(known, start, length, window)

    def _remember_mask(self, real: Array) -> tuple[Array, Array]:
        """Write `real` (B, T) into the cache; give (B, S) and its index before."""
        exists = self.has_variable("cache", "mask")
        slots = self.variable("cache", "mask", jnp.zeros, real.shape, jnp.bool_)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        if not exists:  # this call only gives the cache its shape
            return real, index.value
        start = index.value
        slots.value = lax.dynamic_update_slice(slots.value, real, (0, start))
        index.value = start + real.shape[1]
        return slots.value, start


def _norm(
    config: DecoderConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> Callable[..., RMSNorm]:
    """Make the family's norm, but for its name."""
    return functools.partial(
        RMSNorm, config.rms_norm_eps, dtype, param_dtype, config.norm_around_one
    )


def _visible(
    known: Array, start: Array, length: int, window: int | None = None
) -> Array:
    """Tell which of the slots `known` (B, S) each of the new tokens attends to.

    A token sees the real ones up to itself, and always itself: a row of padding then
    has a softmax over something, on every backend, and stays finite. With a window it
    sees no further back than that many slots, its own among them.

    Returns:
      (B, 1, T, S) bool.
    """
    slots = jnp.arange(known.shape[1])[None, None, :]
    own = (start + jnp.arange(length))[None, :, None]
    seen = slots <= own
    if window is not None:
        seen &= slots > own - window
    return ((seen & known[:, None, :]) | (slots == own))[:, None]
