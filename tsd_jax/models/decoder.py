"""One configurable Linen decoder for every family; it knows nothing of adapters.

The parameter tree, with the layers stacked on a leading axis L by the scan:

    embed_tokens/embedding                              (V, D)
    layers/input_layernorm/scale                        (L, D)
    layers/self_attn/{q,k,v,o}_proj/{kernel,bias}       (L, in, out), (L, out)
    layers/self_attn/{q,k}_norm/scale                   (L, H), if any
    layers/post_attention_layernorm/scale               (L, D)
    layers/{pre,post}_feedforward_layernorm/scale       (L, D), if any
    layers/mlp/{gate,up,down}_proj/{kernel,bias}        (L, in, out), (L, out)
    norm/scale                                          (D,)
    lm_head/kernel                                      (D, V), unless tied

With fused projections, `self_attn/qkv_proj` and `mlp/gate_up_proj` replace the
separate ones. With E experts in a layer, the feed-forward is

    layers/mlp/gate/kernel                                      (L, D, E), the router
    layers/mlp/experts/{gate,up,down}_proj/kernel               (L, E, in, out)
    layers/mlp/shared_expert/{gate,up,down}_proj/kernel         (L, in, out)
    layers/mlp/shared_expert_gate/kernel                        (L, D, 1)

Without the scan the layers are `layers_0`, `layers_1`, ... without an axis L.

Shapes are named B (batch), T (tokens of this call), S (tokens attended to),
N (query heads), K (key and value heads), H (head width), D (hidden), V (vocabulary).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from tsd_jax.models.base import LayeredModel
from tsd_jax.models.blocks import AttentionInputs, Block, LayerKind, make_norm
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.layers import rotary_tables, soft_cap

# Projections that widen D, and those that narrow to D.
_WIDENING = r"(q|k|v|qkv|gate|up|gate_up)_proj"
_NARROWING = r"(o|down)_proj"


def _stacked(axes: int, *spec: str) -> PartitionSpec:
    """Return the spec with the leading axes, which stack matrices, not sharded."""
    return PartitionSpec(*(None,) * axes, *spec)


# Hidden axes on fsdp, heads and feed-forward columns on tensor: a block then needs one
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

# A batch as in training, and heads on tensor where it divides them.
_CACHED = (("data", "fsdp"), None, "tensor")
CACHE_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"layers/self_attn/(key|value)", PartitionSpec(None, *_CACHED)),
    (r"layers_\d+/self_attn/(key|value)", PartitionSpec(*_CACHED)),
    (r"mask", PartitionSpec(*_CACHED[:1])),
    (r".*", PartitionSpec()),
)
"""The same for the collection "cache"."""

LINEAR_KERNELS = r"layers[^/]*/.+_proj/kernel"
"""Kernels worth quantizing: not embeddings, heads, routers or norms."""


class Decoder(LayeredModel):
    """A causal language model: predicts the next token at every position.

    Norms, rotations, softmax and logits are float32, whatever `dtype` is.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        *,
        decode: bool = False,
        head: bool = True,
    ) -> Array:
        """Return the logits of the token that follows each one.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32; by default counted along the tokens `mask` keeps.
          mask: (B, T) bool, True at real tokens; padding may be on either side.
          decode: treat these tokens as the continuation of earlier calls, whose keys
            and values are in the collection "cache" (which must be mutable). A call
            without that collection creates it, empty, with as many slots as there are
            tokens; the caller keeps count of the free slots.
          head: whether to map the last hidden states to logits, as `make_head` does.

        Returns:
          (B, T, V) float32, or (B, T, D) without the head; rows of padding are finite
          but meaningless.
        """
        config = self.config
        embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="embed_tokens",
        )
        inputs = self._attention_inputs(tokens, positions, mask, decode)
        x = embed(tokens)
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.hidden_size), self.dtype)
        x = self.run_layers(Block, self.settings, x, inputs, self._layer_kinds())
        x = make_norm(*self.settings)(name="norm")(x)
        if not head:
            return x
        tied = config.tie_word_embeddings
        of = embed.embedding if tied else _dense_head(*self.settings, name="lm_head")
        return _logits(config, of, x)

    def _layer_kinds(self) -> LayerKind:
        """Return what differs between layers, stacked over them."""

        def stack(values: tuple[bool, ...]) -> Array | None:
            return jnp.asarray(values) if len({*values}) > 1 else None

        return LayerKind(
            windowed=stack(self.config.windowed),
            rotary=stack(self.config.rope_layers),
        )

    def _attention_inputs(
        self, tokens: Array, positions: Array | None, mask: Array | None, decode: bool
    ) -> AttentionInputs:
        """Return rotary tables, masks and the cache's index for `tokens` (B, T)."""
        known, index = mask, None
        if decode:
            real = jnp.ones(tokens.shape, bool) if mask is None else mask
            known, index = self._update_mask(real)
        length = tokens.shape[1]
        start = jnp.zeros((), jnp.int32) if index is None else index
        if known is None:
            counted = jnp.arange(length, dtype=jnp.int32)[None, :]
        else:
            counted = jnp.maximum(jnp.cumsum(known, axis=1, dtype=jnp.int32) - 1, 0)
            counted = lax.dynamic_slice_in_dim(counted, start, length, axis=1)
        positions = counted if positions is None else positions
        tables, window_tables = self._tables(positions), self._window_tables(positions)
        window_mask = self._window_mask(known, start, length)
        if known is None and window_mask is not None:
            known = jnp.ones((1, length), bool)
        full_mask = None if known is None else _attention_mask(known, start, length)
        if all(self.config.windowed):
            tables = tables if window_tables is None else window_tables
            full_mask = full_mask if window_mask is None else window_mask
            window_tables = window_mask = None
        return AttentionInputs(*tables, full_mask, index, window_tables, window_mask)

    def _tables(self, positions: Array) -> tuple[Array, Array]:
        """Return the rotary tables of `positions` (B or 1, T)."""
        config = self.config
        if config.rope_layers and not any(config.rope_layers):
            ones = jnp.ones((*positions.shape, 1, config.rotary_width), jnp.float32)
            return ones, 0 * ones
        return rotary_tables(
            positions, config.rotary_width, config.rope_theta, config.rope_scaling
        )

    def _window_tables(self, positions: Array) -> tuple[Array, Array] | None:
        """Return the rotary tables of windowed layers, if they differ."""
        theta = self.config.rope_local_theta
        if theta is None or not any(self.config.windowed):
            return None
        return rotary_tables(positions, self.config.rotary_width, theta)

    def _window_mask(
        self, known: Array | None, start: Array, length: int
    ) -> Array | None:
        """Return the mask of windowed layers; None if the window covers all slots."""
        window = self.config.sliding_window
        slots = length if known is None else known.shape[1]
        if not any(self.config.windowed) or window is None or window >= slots:
            return None
        known = jnp.ones((1, length), bool) if known is None else known
        return _attention_mask(known, start, length, window)

    def _update_mask(self, real: Array) -> tuple[Array, Array]:
        """Write `real` (B, T) into the cache; return (B, S) and the index before."""
        exists = self.has_variable("cache", "mask")
        slots = self.variable("cache", "mask", jnp.zeros, real.shape, jnp.bool_)
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        if not exists:  # this call only creates the cache
            return real, index.value
        start = index.value
        slots.value = lax.dynamic_update_slice(slots.value, real, (0, start))
        index.value = start + real.shape[1]
        return slots.value, start


def make_head(model: Decoder) -> Callable[[Mapping[str, Any], Array], Array]:
    """Return the function (variables, hidden states (B, T, D)) -> logits (B, T, V).

    With it `model.apply(variables, tokens, head=False)` goes on as the model does, a
    few positions at a time.

    Args:
      model: the decoder; the function reads `head_name(model.config)` of its variables.
    """
    name = head_name(model.config)

    def head(variables: Mapping[str, Any], x: Array) -> Array:
        params = variables["params"][name]
        if model.config.tie_word_embeddings:
            return _logits(model.config, params["embedding"], x)
        dense = _dense_head(*model.settings)
        return _logits(
            model.config, lambda x: cast(Array, dense.apply({"params": params}, x)), x
        )

    return head


def head_name(config: DecoderConfig) -> str:
    """Return the name of the module whose parameters map hidden states to logits.

    Args:
      config: of the decoder.
    """
    return "embed_tokens" if config.tie_word_embeddings else "lm_head"


# The product accumulates to float32: bfloat16 would keep 3 digits of a logit.
_product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)


def _dense_head(
    config: DecoderConfig, dtype: Any, param_dtype: Any, name: str | None = None
) -> nn.Dense:
    """Create the head of a decoder whose embedding is not its head as well."""
    return nn.Dense(
        config.vocab_size,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=_product,
        name=name,
    )


def _logits(
    config: DecoderConfig, head: Array | Callable[[Array], Array], x: Array
) -> Array:
    """Map hidden states to logits by a head, or by the table (V, D) it is tied to."""
    if callable(head):
        logits = head(x)
    else:
        logits = _product(x, head.astype(x.dtype), (((2,), (1,)), ((), ())))
    limit = config.final_logit_softcapping
    return logits if limit is None else soft_cap(logits, limit)


def _attention_mask(
    known: Array, start: Array, length: int, window: int | None = None
) -> Array:
    """Return which slots each of the new tokens attends to.

    A token attends to the real slots up to its own, and always to its own: a row of
    padding then has a softmax over something, and stays finite on every backend.

    Args:
      known: which slots are real, (B, S) bool.
      start: slot of the first new token, () int32.
      length: T, number of new tokens.
      window: how many slots back a token attends, its own included; None for all.

    Returns:
      (B, 1, T, S) bool.
    """
    slots = jnp.arange(known.shape[1])[None, None, :]
    own = (start + jnp.arange(length))[None, :, None]
    allowed = slots <= own
    if window is not None:
        allowed &= slots > own - window
    return ((allowed & known[:, None, :]) | (slots == own))[:, None]
