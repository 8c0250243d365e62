"""The parts of encoders: embeddings, attention, feed-forward and heads.

Modules are named as in Hugging Face's files. Shapes are named B (batch), T (tokens),
N (heads), H (head width), D (hidden), P (rows of the table of relative positions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import DTypeLike

from tsd_jax.models.base import ModelPart
from tsd_jax.models.encoder_config import ENCODER_ACTIVATIONS, EncoderConfig


@struct.dataclass
class RelativePositions:
    """The relative positions within T tokens.

    Attributes:
      table: embeddings, (P, D).
      rows: the row of `table` for query i and key j, (T, T) int32.
    """

    table: Array
    rows: np.ndarray | Array


@struct.dataclass
class ConvBranch:
    """What DeBERTa adds to the first layer's output: LayerNorm(x + added) · kept.

    Attributes:
      added: output of the convolution, (B, T, D).
      kept: whether a token is real, (B, T, 1) bool.
      scale: of the norm, (D,).
      bias: of the norm, (D,).
    """

    added: Array
    kept: Array
    scale: Array
    bias: Array


@struct.dataclass
class EncoderContext:
    """What every layer gets besides the hidden states.

    Attributes:
      mask: which tokens each one attends to, (B, 1, T or 1, T) bool; None for all.
      relative: relative positions; None where a family has none.
      convolution: added after the first layer; None where a family has none.
    """

    mask: Array | None
    relative: RelativePositions | None = None
    convolution: ConvBranch | None = None


class EncoderPart(ModelPart):
    """A module inside an encoder."""

    config: EncoderConfig

    def norm(self) -> nn.LayerNorm:
        """Create the norm; its statistics are float32, and exact for a tiny ε."""
        return nn.LayerNorm(
            epsilon=self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,
            name="LayerNorm",
        )


class Embeddings(EncoderPart):
    """The normalised sum of the embeddings of tokens, positions and token types."""

    @nn.compact
    def __call__(
        self, tokens: Array, positions: Array | None, token_types: Array | None
    ) -> Array:
        """Map (B, T) to (B, T, D)."""
        config = self.config
        x = self._table(config.vocab_size, "word_embeddings")(tokens)
        if config.type_vocab_size:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self._table(config.type_vocab_size, "token_type_embeddings")(types)
        if config.absolute_positions:
            rows = self._positions(tokens) if positions is None else positions
            table = self._table(config.max_position_embeddings, "position_embeddings")
            x = x + table(rows)
        if config.embedding_size is not None:
            x = self.dense(config.hidden_size, "embed_proj", use_bias=False)(x)
        return self.norm()(x)

    def _table(self, rows: int, name: str) -> nn.Embed:
        width = self.config.embedding_size or self.config.hidden_size
        return nn.Embed(
            rows, width, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )

    def _positions(self, tokens: Array) -> Array:
        """Count all slots from 0, or the real tokens from the padding id plus one."""
        if not self.config.counted_positions:
            return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        pad = self.config.pad_token_id
        real = (tokens != pad).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + pad


class SelfAttention(EncoderPart):
    """Attention of every token to all tokens of the mask."""

    @nn.compact
    def __call__(self, x: Array, context: EncoderContext) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        query, key, value = (
            split_heads(self.dense(self.config.hidden_size, name)(x), self.config)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=context.mask)
        return mixed.reshape(x.shape)


class Attention(EncoderPart):
    """Attention with its output projection, added to x and normalised.

    Attributes:
      self_attention: the module that attends.
    """

    self_attention: type[EncoderPart]

    @nn.compact
    def __call__(self, x: Array, context: EncoderContext) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        mixed = self.self_attention(*self.settings, name="self")(x, context)
        return Residual(*self.settings, name="output")(mixed, x)


class Intermediate(EncoderPart):
    """The first layer of the feed-forward network: act(x K + b)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, intermediate size)."""
        wide = self.dense(self.config.intermediate_size, "dense")(x)
        return ENCODER_ACTIVATIONS[self.config.hidden_act](wide)


class Residual(EncoderPart):
    """A projection, added to the residual stream and normalised."""

    @nn.compact
    def __call__(self, x: Array, stream: Array) -> Array:
        """Map x (B, T, any) and the stream (B, T, D) to (B, T, D)."""
        added = self.dense(self.config.hidden_size, "dense")(x)
        return self.norm()(stream + added)


class EncoderBlock(EncoderPart):
    """One layer: attention, then feed-forward.

    Attributes:
      self_attention: the module that attends.
    """

    self_attention: type[EncoderPart]

    @nn.compact
    def __call__(
        self, x: Array, context: EncoderContext, layer: Array
    ) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form that a scan expects.

        Args:
          x: hidden states.
          context: of every layer.
          layer: number of this one, () int32.
        """
        attention = Attention(*self.settings, self.self_attention, name="attention")
        mixed = attention(x, context)
        middle = Intermediate(*self.settings, name="intermediate")(mixed)
        x = Residual(*self.settings, name="output")(middle, mixed)
        if context.convolution is not None:
            joined = add_convolution(x, context.convolution, self.config.layer_norm_eps)
            x = jnp.where(layer == 0, joined, x)
        return x, None


class Pooler(nn.Module):
    """The first token's state through act(x K + b), in float32.

    Attributes:
      config: the model's config.
      param_dtype: of the parameters.
      activation: a key of `ENCODER_ACTIVATIONS`.
    """

    config: EncoderConfig
    param_dtype: DTypeLike
    activation: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, D) to (B, D)."""
        dense = nn.Dense(
            self.config.hidden_size, param_dtype=self.param_dtype, name="dense"
        )
        return ENCODER_ACTIVATIONS[self.activation](dense(x))


class DenseHead(nn.Module):
    """The head of a RoBERTa: one hidden layer between the first token and the logits.

    Attributes:
      config: the model's config.
      param_dtype: of the parameters.
    """

    config: EncoderConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, D) to (B, labels)."""
        dense: Any = {"param_dtype": self.param_dtype}
        x = nn.tanh(nn.Dense(self.config.hidden_size, **dense, name="dense")(x))
        return nn.Dense(self.config.num_labels, **dense, name="out_proj")(x)


def _pooled(config: EncoderConfig, param_dtype: DTypeLike, x: Array) -> Array:
    x = Pooler(config, param_dtype, config.pooler_act, name="pooler")(x)
    return nn.Dense(config.num_labels, param_dtype=param_dtype, name="classifier")(x)


def _dense(config: EncoderConfig, param_dtype: DTypeLike, x: Array) -> Array:
    return DenseHead(config, param_dtype, name="classifier")(x)


HEADS: Mapping[str, Callable[[EncoderConfig, DTypeLike, Array], Array]] = {
    "pooled": _pooled,
    "dense": _dense,
}


def classify(config: EncoderConfig, param_dtype: DTypeLike, x: Array) -> Array:
    """Return the logits of the first slot, in float32; without a head, all states.

    As in transformers the first slot is read even where it is padding, so pad on the
    right.

    Args:
      config: of the model.
      param_dtype: of the head.
      x: hidden states, (B, T, D).

    Returns:
      (B, labels), or (B, T, D) where the model has no labels.
    """
    x = x.astype(jnp.float32)
    if not config.num_labels:
        return x
    return HEADS[config.head](config, param_dtype, x[:, 0])


def add_convolution(x: Array, branch: ConvBranch, epsilon: float) -> Array:
    """Return LayerNorm(x + added), zero at padding.

    Args:
      x: output of the first layer, (B, T, D).
      branch: the output of the convolution, and the norm.
      epsilon: ε of the norm.
    """
    total = (x + branch.added).astype(jnp.float32)
    unit = jax.nn.standardize(total, axis=-1, epsilon=epsilon)
    scale, bias = branch.scale[None, None], branch.bias[None, None]
    return ((unit * scale + bias) * branch.kept).astype(x.dtype)


def split_heads(x: Array, config: EncoderConfig) -> Array:
    """Map (B, T, D) to (B, T, N, H)."""
    return x.reshape(*x.shape[:2], config.num_attention_heads, config.head_dim)
