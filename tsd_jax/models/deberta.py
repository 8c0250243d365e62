"""DeBERTa-v2 and v3 in Linen: attention to content and to relative positions apart.

The score of query i and key j is (arXiv:2006.03654, equation 4)

    (q_i · k_j  +  q_i · pk_δ(i,j)  +  k_j · pq_δ(j,i)) / sqrt(3 H)

where pk and pq are projections of one table of relative positions and δ is the bucket
of a distance. Beyond the tree of `tsd_jax.models.encoder` there are

    layers/attention/self/{query,key,value}_proj       with `_proj` to their names
    layers/attention/self/pos_{key,query}_proj         where they are not shared
    encoder/rel_embeddings/embedding                   (2 span, D)
    encoder/LayerNorm/{scale,bias}                     where the table is normalised
    encoder/conv/{conv/{kernel,bias},LayerNorm}        (width, D / groups, D), with one
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from tsd_jax.models.encoder import check_length, run_layers
from tsd_jax.models.encoder_blocks import (
    Context,
    Embeddings,
    Joining,
    Relative,
    make_dense,
    make_norm,
    read_out,
    split_heads,
)
from tsd_jax.models.encoder_config import (
    ENCODER_ACTIVATIONS,
    Convolution,
    Disentangled,
    EncoderConfig,
)


class Deberta(nn.Module):
    """Read a sequence both ways: a DeBERTa-v2 or v3; attributes as `Encoder`'s."""

    config: EncoderConfig
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
        token_types: Array | None = None,
    ) -> Array:
        """Return the logits of each sequence, or its hidden states; as `Encoder`."""
        check_length(self.config, tokens)
        settings = (self.config, self.dtype, self.param_dtype)
        embed = Embeddings(*settings, name="embeddings")
        x = embed(tokens, positions, token_types)
        real = jnp.ones(tokens.shape, bool) if mask is None else mask
        kept = real[:, :, None]
        x = jnp.where(kept, x, 0)
        # As there, padding attends to nothing, that is to everything alike.
        visible = None if mask is None else (kept & real[:, None, :])[:, None]
        beside = Beside(*settings, name="encoder")
        x = run_layers(self, DisentangledAttention, x, beside(x, kept, visible))
        return read_out(self.config, self.param_dtype, x)


class Beside(nn.Module):
    """Own what all layers share: the table of positions, and the convolution."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, kept: Array, visible: Array | None) -> Context:
        """Make the context of embeddings `x` (B, T, D), real where `kept` (B, T, 1)."""
        config, numbers = self.config, self.config.disentangled
        assert numbers is not None
        settings = (config, self.dtype, self.param_dtype)
        table = nn.Embed(
            2 * numbers.span,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="rel_embeddings",
        ).embedding
        # Few of the rows are within reach of a short sequence.
        rows = position_rows(x.shape[1], numbers)
        first, last = int(rows.min()), int(rows.max())
        near = jnp.asarray(table[first : last + 1], self.dtype)
        if numbers.norm_embeddings:
            near = make_norm(*settings)(near)
        joining = None
        if config.convolution is not None:
            joining = Convolved(*settings, config.convolution, name="conv")(x, kept)
        return Context(visible, Relative(near, rows - first), joining)


class Convolved(nn.Module):
    """Make what joins the first layer's result: act(conv(x)), and a norm."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike
    numbers: Convolution

    @nn.compact
    def __call__(self, x: Array, kept: Array) -> Joining:
        """Convolve (B, T, D) along T."""
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        added = nn.Conv(
            self.config.hidden_size,
            (self.numbers.width,),
            feature_group_count=self.numbers.groups,
            **types,
            name="conv",
        )(x)
        act = ENCODER_ACTIVATIONS[self.numbers.activation]
        norm = _Affine(self.config.hidden_size, self.param_dtype, name="LayerNorm")
        return Joining(act(jnp.where(kept, added, 0)), kept, *norm())


class _Affine(nn.Module):
    """Own scale and bias of a norm that is computed elsewhere."""

    width: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Return both, (D,)."""
        init, shape = nn.initializers, (self.width,)
        scale = self.param("scale", init.ones, shape, self.param_dtype)
        return scale, self.param("bias", init.zeros, shape, self.param_dtype)


class DisentangledAttention(nn.Module):
    """Attend to content, and to relative positions, by sums of scores."""

    config: EncoderConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, context: Context) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        config, relative = self.config, context.relative
        numbers = config.disentangled
        assert numbers is not None
        assert relative is not None

        def project(name: str):
            return make_dense(self, config.hidden_size, f"{name}_proj")

        content = {name: project(name) for name in ("query", "key", "value")}
        query, key, value = (split_heads(f(x), config) for f in content.values())
        terms = numbers.content_to_position + numbers.position_to_content
        scale = (config.head_dim * (1 + terms)) ** -0.5
        table, scores = relative.table[None], None

        def positions(name: str) -> Array:
            shared = numbers.share_att_key
            own = content[name] if shared else project(f"pos_{name}")
            return split_heads(own(table), config)[0]

        # scores[b, n, i, j]; both gathers are along rows of (T, P).
        if numbers.content_to_position:
            by_row = _products(query, positions("key"))
            scores = _pick(by_row, relative.rows)
        if numbers.position_to_content:
            by_row = _products(key, positions("query"))
            picked = _pick(by_row, relative.rows.T).swapaxes(-1, -2)
            scores = picked if scores is None else scores + picked
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if scores is None else scores * scale,
            mask=context.visible,
            scale=scale,
        )
        return mixed.reshape(x.shape)


def _products(heads: Array, table: Array) -> Array:
    """Return heads · rows: (B, T, N, H), (P, N, H) -> (B, N, T, P) float32."""
    return jnp.einsum(
        "btnh,pnh->bntp", heads, table, preferred_element_type=jnp.float32
    )


def _pick(by_row: Array, rows: Any) -> Array:
    """Pick from (B, N, T, P) the entries `rows` (T, T) of the last axis."""
    return jnp.take_along_axis(by_row, jnp.asarray(rows)[None, None], axis=-1)


def position_rows(length: int, numbers: Disentangled) -> np.ndarray:
    """Return the row in the table of positions of every query and key, (T, T) int32.

    Distances i - j up to half the buckets have their own; the others share

        ceil(log(d / mid) / log((max - 1) / mid) · (mid - 1)) + mid

    Logarithms are float32, as where the models were trained: a rounding could move a
    distance to the next bucket.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if numbers.position_buckets is not None:
        distance = _bucket(
            distance, numbers.position_buckets, numbers.max_relative_positions
        )
    span = numbers.span
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def _bucket(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    mid = buckets // 2
    far = np.where(np.abs(distance) < mid, mid - 1, np.abs(distance))
    ratio = np.log(far.astype(np.float32) / np.float32(mid))
    ratio /= np.log(np.float32((longest - 1) / mid))
    shared = np.ceil(ratio * np.float32(mid - 1)) + mid
    return np.where(far <= mid, distance, shared * np.sign(distance)).astype(np.int64)
