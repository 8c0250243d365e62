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
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tsd_jax.models.blocks import Block, LayerKind, Placement, make_norm
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.layers import cap, rotary_tables

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


LINEAR_KERNELS = r"layers[^/]*/.+_proj/kernel"
"""Kernels that are worth quantizing: not embeddings, heads, routers or norms."""


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
        """Return the logits of the token after each one.

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
        x = make_norm(config, self.dtype, self.param_dtype)(name="norm")(x)
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

    def _run_layers(self, x: Array, placement: Placement) -> Array:
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

    def _kinds(self) -> LayerKind:
        """Gather over the layers what is not the same in all of them."""

        def gathered(each: tuple[bool, ...]) -> Array | None:
            return jnp.asarray(each) if len({*each}) > 1 else None

        return LayerKind(
            windowed=gathered(self.config.windowed),
            turned=gathered(self.config.rope_layers),
        )

    def _place(
        self, tokens: Array, positions: Array | None, mask: Array | None, decode: bool
    ) -> Placement:
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
        return Placement(*wide, visible, index, (near, window))

    def _tables(self, positions: Array) -> tuple[Array, Array]:
        """Return cos and sin for `positions` (B or 1, T)."""
        config = self.config
        if config.rope_layers and not any(config.rope_layers):
            ones = jnp.ones((*positions.shape, 1, config.rotary_width), jnp.float32)
            return ones, 0 * ones
        return rotary_tables(
            positions, config.rotary_width, config.rope_theta, config.rope_scaling
        )

    def _near_tables(self, positions: Array) -> tuple[Array, Array] | None:
        """Return those of windowed layers, where they have a theta of their own."""
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
