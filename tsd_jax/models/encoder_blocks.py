"""What encoders are made of: embeddings, attention, feed-forward, heads.

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

from tsd_jax.models.encoder_config import ENCODER_ACTIVATIONS, EncoderConfig


@struct.dataclass
class Relative:
    """Hold the relative positions that T tokens can have.

    table: (P, D), their embeddings. rows: (T, T) int32, the row of query i, key j.
    """

    table: Array
    rows: np.ndarray | Array


@struct.dataclass
class Joining:
    """Hold what joins the first layer's result: LayerNorm(x + added) where kept.

    added: (B, T, D). kept: (B, T, 1). scale, bias: (D,), of the norm.
    """

    added: Array
    kept: Array
    scale: Array
    bias: Array


@struct.dataclass
class Context:
    """What every layer sees beside the stream; None where a family has no such thing.

    visible: (B, 1, T or 1, T) bool, or None for all. relative: positions. joining:
    what the first layer's result is joined by.
    """

    visible: Array | None
    relative: Relative | None = None
    joining: Joining | None = None


class Embeddings(nn.Module):
    """Sum the embeddings of tokens, positions and token types, and normalise."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

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
            places = self._positions(tokens) if positions is None else positions
            table = self._table(config.max_position_embeddings, "position_embeddings")
            x = x + table(places)
        if config.embedding_size is not None:
            x = nn.Dense(
                config.hidden_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="embed_proj",
            )(x)
        return make_norm(config, self.dtype, self.param_dtype)(x)

    def _table(self, rows: int, name: str) -> nn.Embed:
        width = self.config.embedding_size or self.config.hidden_size
        return nn.Embed(
            rows, width, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )

    def _positions(self, tokens: Array) -> Array:
        """Count the slots, or the tokens that are no padding from behind its id."""
        if not self.config.counted_positions:
            return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        pad = self.config.pad_token_id
        real = (tokens != pad).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + pad


class SelfAttention(nn.Module):
    """Attend to every visible token."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        query, key, value = (
            split_heads(make_dense(self, self.config.hidden_size, name)(x), self.config)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, mask=context.visible)
        return mixed.reshape(x.shape)


class Attention(nn.Module):
    """Attend, project and add.

    Attributes:
      mixing: the module that attends.
    """

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    mixing: type[nn.Module]

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        settings: Any = (self.config, self.dtype, self.param_dtype)
        mixed = self.mixing(*settings, name="self")(x, context)
        return Residual(*settings, name="output")(mixed, x)


class Intermediate(nn.Module):
    """Widen: act(x K + b)."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map (B, T, D) to (B, T, intermediate size)."""
        wide = make_dense(self, self.config.intermediate_size, "dense")(x)
        return ENCODER_ACTIVATIONS[self.config.hidden_act](wide)


class Residual(nn.Module):
    """Project, add to the stream, and normalise the sum."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, stream: Array) -> Array:
        """Map (B, T, anything) and (B, T, D) to (B, T, D)."""
        added = make_dense(self, self.config.hidden_size, "dense")(x)
        return make_norm(self.config, self.dtype, self.param_dtype)(stream + added)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream and normalised.

    Attributes:
      mixing: the module that attends.
    """

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    mixing: type[nn.Module]

    @nn.compact
    def __call__(self, x: Array, context: Context, layer: Array) -> tuple[Array, None]:
        """Map (B, T, D) to (B, T, D), in the form a scan wants; layer: () int."""
        settings: Any = (self.config, self.dtype, self.param_dtype)
        mixed = Attention(*settings, mixing=self.mixing, name="attention")(x, context)
        middle = Intermediate(*settings, name="intermediate")(mixed)
        x = Residual(*settings, name="output")(middle, mixed)
        if context.joining is not None:
            joined = join(x, context.joining, self.config.layer_norm_eps)
            x = jnp.where(layer == 0, joined, x)
        return x, None


class Pooler(nn.Module):
    """Map the first token's state: act(x K + b), in float32.

    Attributes:
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
    """Map the first token's state to logits through one layer of its own (RoBERTa)."""

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


def read_out(config: EncoderConfig, param_dtype: DTypeLike, x: Array) -> Array:
    """Return the logits of the first slot, in float32; without a head, all states.

    Transformers reads the first slot too, also where padding stands there: pad on the
    right.

    Args:
      config: of the model. param_dtype: of the head. x: (B, T, D).

    Returns:
      (B, labels), or (B, T, D) where there are no labels.
    """
    x = x.astype(jnp.float32)
    if not config.num_labels:
        return x
    return HEADS[config.head](config, param_dtype, x[:, 0])


def make_dense(module: Any, features: int, name: str) -> nn.Dense:
    """Make a projection of a module here, in its own types."""
    return nn.Dense(
        features, dtype=module.dtype, param_dtype=module.param_dtype, name=name
    )


def make_norm(
    config: EncoderConfig, dtype: DTypeLike, param_dtype: DTypeLike
) -> nn.LayerNorm:
    """Make the norm, whose statistics are float32 and exact for a tiny ε."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        name="LayerNorm",
    )


def join(x: Array, joining: Joining, epsilon: float) -> Array:
    """Return LayerNorm(x + added), zero where nothing is kept."""
    wide = (x + joining.added).astype(jnp.float32)
    unit = jax.nn.standardize(wide, axis=-1, epsilon=epsilon)
    scale, bias = joining.scale[None, None], joining.bias[None, None]
    return ((unit * scale + bias) * joining.kept).astype(x.dtype)


def split_heads(x: Array, config: EncoderConfig) -> Array:
    """Map (B, T, D) to (B, T, N, H)."""
    return x.reshape(*x.shape[:2], config.num_attention_heads, config.head_dim)
