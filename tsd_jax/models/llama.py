"""The Llama family: one configurable decoder in Linen that knows nothing of adapters.

The parameter tree, with the layers stacked on a leading axis L by the scan:

    embed_tokens/embedding                              (V, D)
    layers/input_layernorm/scale                        (L, D)
    layers/self_attn/{q,k,v,o}_proj/{kernel,bias}       (L, in, out), (L, out)
    layers/post_attention_layernorm/scale               (L, D)
    layers/mlp/{gate,up,down}_proj/{kernel,bias}        (L, in, out), (L, out)
    norm/scale                                          (D,)
    lm_head/kernel                                      (D, V), where it is not tied

Without the scan the layers are `layers_0`, `layers_1`, ... and have no axis L.

Shapes are named B (batch), T (tokens of this call), S (tokens attended to),
N (query heads), K (key and value heads), H (head width), D (hidden), V (vocabulary).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError
from tsd_jax.models.layers import RMSNorm, rotary_tables, rotate

# Inner axes on fsdp, heads and feed-forward columns on tensor: a block then needs one
# reduction over `tensor` after o_proj and one after down_proj. First full match wins.
LLAMA_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (
        r"layers/.*/(q|k|v|gate|up)_proj/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (r"layers/.*/(o|down)_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers_\d+/.*/(q|k|v|gate|up)_proj/kernel", PartitionSpec("fsdp", "tensor")),
    (r"layers_\d+/.*/(o|down)_proj/kernel", PartitionSpec("tensor", "fsdp")),
    (r".*", PartitionSpec()),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Hold the numbers that shape a Llama; the names are those of Hugging Face.

    Raises:
      InputError: if a size is not positive, or the heads do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise InputError(
                    f"{field.name} must be positive, not {value}: correct the "
                    "model's config"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads}): correct the "
                "model's config"
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim ({self.head_dim}) must be even, for the rotary embedding "
                "turns pairs: correct the model's config"
            )


@struct.dataclass
class _Placement:
    """Where this call's tokens stand; the same for every layer.

    cos, sin: (B or 1, T, 1, H) float32. visible: (B, 1, T, S) bool, or None for plain
    causal attention. index: () int32, the cache's first free slot, or None without it.
    """

    cos: Array
    sin: Array
    visible: Array | None
    index: Array | None


class Attention(nn.Module):
    """Attend causally with grouped keys and values and rotary positions."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, placement: _Placement) -> Array:
        """Map (B, T, D) to (B, T, D); with a cache, attend to all its S slots."""
        config = self.config
        dense = functools.partial(
            nn.Dense,
            use_bias=config.attention_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

        def heads(name: str, number: int) -> Array:
            flat = dense(number * config.head_dim, name=name)(x)
            return flat.reshape(*x.shape[:2], number, config.head_dim)

        query = heads("q_proj", config.num_attention_heads)
        key = heads("k_proj", config.num_key_value_heads)
        value = heads("v_proj", config.num_key_value_heads)
        query = rotate(query, placement.cos, placement.sin)
        key = rotate(key, placement.cos, placement.sin)
        if placement.index is not None:
            key = self._remember("key", key, placement.index)
            value = self._remember("value", value, placement.index)
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=placement.visible,
            is_causal=placement.visible is None,
        )
        return dense(config.hidden_size, name="o_proj")(mixed.reshape(*x.shape[:2], -1))

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
    """Apply the gated feed-forward: (silu(x G) ∘ x U) D."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        config = self.config
        dense = functools.partial(
            nn.Dense,
            use_bias=config.mlp_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        gate = dense(config.intermediate_size, name="gate_proj")(x)
        up = dense(config.intermediate_size, name="up_proj")(x)
        return dense(config.hidden_size, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """Add attention, then feed-forward, each on the normalised stream."""

    config: LlamaConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, placement: _Placement) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form a scan wants."""
        settings = (self.config, self.dtype, self.param_dtype)
        norm = functools.partial(
            RMSNorm, self.config.rms_norm_eps, self.dtype, self.param_dtype
        )
        normed = norm(name="input_layernorm")(x)
        x = x + Attention(*settings, name="self_attn")(normed, placement)
        normed = norm(name="post_attention_layernorm")(x)
        return x + MLP(*settings, name="mlp")(normed), None


class Llama(nn.Module):
    """Predict the next token at every position.

    Attributes:
      config: the numbers that shape the model.
      dtype: of the computation; norms, rotations, softmax and logits are float32.
      param_dtype: of the parameters that `init` makes.
      scan_layers: stack the layers' parameters and compile one block, not L.
      remat: keep only each block's input for the gradient and recompute the rest.
    """

    config: LlamaConfig
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
        x = self._run_layers(embed(tokens), placement)
        x = RMSNorm(config.rms_norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        # Logits leave the product in float32: bfloat16 would round them to 3 digits.
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if config.tie_word_embeddings:
            table = jnp.asarray(embed.embedding, self.dtype)
            return product(x, table, (((2,), (1,)), ((), ())))
        return nn.Dense(
            config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=product,
            name="lm_head",
        )(x)

    def _run_layers(self, x: Array, placement: _Placement) -> Array:
        """Send (B, T, D) through all blocks."""
        settings = (self.config, self.dtype, self.param_dtype)
        number = self.config.num_hidden_layers
        block: Any = Block
        if self.remat:
            # In a scan nothing can be merged across iterations, so no barrier.
            block = nn.remat(Block, prevent_cse=not self.scan_layers)
        if not self.scan_layers:
            for layer in range(number):
                x, _ = block(*settings, name=f"layers_{layer}")(x, placement)
            return x
        everywhere: Any = nn.broadcast  # the placement is not scanned over
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=everywhere,
            length=number,
        )
        x, _ = scanned(*settings, name="layers")(x, placement)
        return x

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
            visible = None
            counted = jnp.arange(length, dtype=jnp.int32)[None, :]
        else:
            visible = _visible(known, start, length)
            counted = jnp.maximum(jnp.cumsum(known, axis=1, dtype=jnp.int32) - 1, 0)
            counted = lax.dynamic_slice_in_dim(counted, start, length, axis=1)
        cos, sin = rotary_tables(
            counted if positions is None else positions,
            self.config.head_dim,
            self.config.rope_theta,
        )
        return _Placement(cos, sin, visible, index)

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


def _visible(known: Array, start: Array, length: int) -> Array:
    """Tell which of the slots `known` (B, S) each of the new tokens attends to.

    A token sees the real ones up to itself, and always itself: a row of padding then
    has a softmax over something, on every backend, and stays finite.

    Returns:
      (B, 1, T, S) bool.
    """
    slots = jnp.arange(known.shape[1])[None, None, :]
    own = (start + jnp.arange(length))[None, :, None]
    return (((slots <= own) & known[:, None, :]) | (slots == own))[:, None]
