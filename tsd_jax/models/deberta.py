"""DeBERTa-v2 and v3 in Linen: separate attention to content and relative positions.

The score of query i and key j is (arXiv:2006.03654, equation 4)

    (q_i · k_j  +  q_i · pk_δ(i,j)  +  k_j · pq_δ(i,j)) / sqrt(3 H)

where pk and pq are projections of one table of relative positions and δ is the bucket
of a distance. (The paper writes δ(j,i) in the last term; its published code and
checkpoints have δ(i,j).) Compared with the tree of `tsd_jax.models.encoder`:

    layers/attention/self/{query,key,value}_proj       with `_proj` in their names
    layers/attention/self/pos_{key,query}_proj         unless shared
    encoder/rel_embeddings/embedding                   (2 span, D)
    encoder/LayerNorm/{scale,bias}                     if the table is normalised
    encoder/conv/{conv/{kernel,bias},LayerNorm}        (width, D / groups, D), if any
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from tsd_jax.models.encoder import Encoder
from tsd_jax.models.encoder_blocks import (
    ConvBranch,
    EncoderContext,
    EncoderPart,
    RelativePositions,
    split_heads,
)
from tsd_jax.models.encoder_config import (
    ENCODER_ACTIVATIONS,
    ConvConfig,
    DisentangledConfig,
)


class Deberta(Encoder):
    """A DeBERTa-v2 or v3; called as an `Encoder`."""

    def _encode(self, x: Array, mask: Array | None) -> Array:
        """Map embeddings (B, T, D) to hidden states (B, T, D)."""
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        kept = real[:, :, None]
        x = jnp.where(kept, x, 0)
        # As in transformers, padding attends to nothing, that is to all alike.
        pairs = None if mask is None else (kept & real[:, None, :])[:, None]
        shared = SharedParts(*self.settings, name="encoder")
        context = shared(x, kept, pairs)
        return self._run_blocks(DisentangledAttention, x, context)


class SharedParts(EncoderPart):
    """What all layers share: the table of relative positions and the convolution."""

    @nn.compact
    def __call__(self, x: Array, kept: Array, mask: Array | None) -> EncoderContext:
        """Return the context of all layers.

        Args:
          x: embeddings, (B, T, D).
          kept: whether a token is real, (B, T, 1) bool.
          mask: which tokens each one attends to, (B, 1, T, T) bool; None for all.
        """
        config, attention = self.config, self.config.disentangled
        assert attention is not None
        table = nn.Embed(
            2 * attention.span,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="rel_embeddings",
        ).embedding
        # A short sequence needs only few of the rows.
        rows = position_rows(x.shape[1], attention)
        first, last = int(rows.min()), int(rows.max())
        needed = jnp.asarray(table[first : last + 1], self.dtype)
        if attention.norm_embeddings:
            needed = self.norm()(needed)
        branch = None
        if config.convolution is not None:
            convolve = Convolution(*self.settings, config.convolution, name="conv")
            branch = convolve(x, kept)
        return EncoderContext(mask, RelativePositions(needed, rows - first), branch)


class Convolution(EncoderPart):
    """The convolution of the embeddings: act(conv(x)), and the norm to add it with.

    Attributes:
      convolution: its config.
    """

    convolution: ConvConfig

    @nn.compact
    def __call__(self, x: Array, kept: Array) -> ConvBranch:
        """Convolve x (B, T, D) along T where `kept` (B, T, 1)."""
        types: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        added = nn.Conv(
            self.config.hidden_size,
            (self.convolution.width,),
            feature_group_count=self.convolution.groups,
            **types,
            name="conv",
        )(x)
        act = ENCODER_ACTIVATIONS[self.convolution.activation]
        norm = _Affine(self.config.hidden_size, self.param_dtype, name="LayerNorm")
        return ConvBranch(act(jnp.where(kept, added, 0)), kept, *norm())


class _Affine(nn.Module):
    """Scale and bias of a norm that is computed elsewhere."""

    width: int
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """Return both, (D,)."""
        init, shape = nn.initializers, (self.width,)
        scale = self.param("scale", init.ones, shape, self.param_dtype)
        return scale, self.param("bias", init.zeros, shape, self.param_dtype)


class DisentangledAttention(EncoderPart):
    """Attention whose scores are sums over content and relative positions."""

    @nn.compact
    def __call__(self, x: Array, context: EncoderContext) -> Array:
        """Map (B, T, D) to (B, T, D)."""
        config, attention = self.config, self.config.disentangled
        assert attention is not None
        content = {
            name: self.dense(config.hidden_size, f"{name}_proj")
            for name in ("query", "key", "value")
        }
        query, key, value = (
            split_heads(project(x), config) for project in content.values()
        )
        both = (attention.content_to_position, attention.position_to_content)
        scale = (config.head_dim * (1 + both.count(True))) ** -0.5
        scores = self._position_scores(content, query, key, context.relative)
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if scores is None else scores * scale,
            mask=context.mask,
            scale=scale,
        )
        return mixed.reshape(x.shape)

    def _position_scores(
        self,
        content: dict[str, nn.Dense],
        query: Array,
        key: Array,
        relative: RelativePositions | None,
    ) -> Array | None:
        """Return the scores that involve positions, (B, N, T, T), unscaled; or None.

        Args:
          content: {name: projection} of content, also used where positions share it.
          query: (B, T, N, H).
          key: (B, T, N, H).
          relative: the relative positions.
        """
        config, attention = self.config, self.config.disentangled
        assert attention is not None
        assert relative is not None
        table, scores = relative.table[None], None

        def positions(name: str) -> Array:
            shared = attention.share_att_key
            width = config.hidden_size
            own = content[name] if shared else self.dense(width, f"pos_{name}_proj")
            return split_heads(own(table), config)[0]

        # Both gathers are along the rows of (T, P).
        if attention.content_to_position:
            by_row = _products(query, positions("key"))
            scores = _pick(by_row, relative.rows)
        if attention.position_to_content:
            by_row = _products(key, positions("query"))
            picked = _pick(by_row, relative.rows.T).swapaxes(-1, -2)
            scores = picked if scores is None else scores + picked
        return scores


def _products(heads: Array, table: Array) -> Array:
    """Return heads · rows: (B, T, N, H), (P, N, H) -> (B, N, T, P) float32."""
    return jnp.einsum(
        "btnh,pnh->bntp", heads, table, preferred_element_type=jnp.float32
    )


def _pick(by_row: Array, rows: Any) -> Array:
    """Pick from (B, N, T, P) the entries `rows` (T, T) of the last axis."""
    return jnp.take_along_axis(by_row, jnp.asarray(rows)[None, None], axis=-1)


def position_rows(length: int, config: DisentangledConfig) -> np.ndarray:
    """Return the row of the table of positions for query i and key j, (T, T) int32.

    Distances i - j up to half the buckets have a row of their own; the others share

        ceil(log(d / mid) / log((max - 1) / mid) · (mid - 1)) + mid

    Logarithms are float32, as in the code that trained the models: another rounding
    could move a distance to the next bucket.

    Args:
      length: T.
      config: of the attention.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if config.position_buckets is not None:
        distance = _bucket(
            distance, config.position_buckets, config.max_relative_positions
        )
    span = config.span
    return np.clip(distance + span, 0, 2 * span - 1).astype(np.int32)


def _bucket(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    mid = buckets // 2
    far = np.where(np.abs(distance) < mid, mid - 1, np.abs(distance))
    ratio = np.log(far.astype(np.float32) / np.float32(mid))
    ratio /= np.log(np.float32((longest - 1) / mid))
    shared = np.ceil(ratio * np.float32(mid - 1)) + mid
    return np.where(far <= mid, distance, shared * np.sign(distance)).astype(np.int64)
