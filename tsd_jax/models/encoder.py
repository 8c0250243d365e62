"""BERT and RoBERTa in Linen; they know nothing of adapters.

The parameter tree, with the layers stacked on a leading axis L by the scan:

    embeddings/{word,position,token_type}_embeddings/embedding
    embeddings/LayerNorm/{scale,bias}                            (D,)
    layers/attention/self/{query,key,value}/{kernel,bias}        (L, D, D), (L, D)
    layers/attention/output/dense/{kernel,bias}                  (L, D, D), (L, D)
    layers/intermediate/dense/{kernel,bias}                      (L, in, out), (L, out)
    layers/output/dense/{kernel,bias}                            (L, in, out), (L, out)
    layers/{attention/,}output/LayerNorm/{scale,bias}            (L, D)
    pooler/dense, classifier                           the head of a BERT, if any
    classifier/{dense,out_proj}                        the head of a RoBERTa, if any

Without the scan the layers are `layers_0`, `layers_1`, ... without an axis L.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from tsd_jax.core.errors import InputError
from tsd_jax.models.base import LayeredModel
from tsd_jax.models.encoder_blocks import (
    Embeddings,
    EncoderBlock,
    EncoderContext,
    SelfAttention,
    classify,
)
from tsd_jax.models.encoder_config import EncoderConfig

_WIDENING = r"(attention/self/\w+|intermediate/dense)/kernel"
_NARROWING = r"(attention/)?output/dense/kernel"

# As in decoders: hidden axes on fsdp, heads and feed-forward columns on tensor.
ENCODER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embeddings/word_embeddings/embedding", PartitionSpec("tensor", "fsdp")),
    (rf"layers/{_WIDENING}", PartitionSpec(None, "fsdp", "tensor")),
    (rf"layers/{_NARROWING}", PartitionSpec(None, "tensor", "fsdp")),
    (rf"layers_\d+/{_WIDENING}", PartitionSpec("fsdp", "tensor")),
    (rf"layers_\d+/{_NARROWING}", PartitionSpec("tensor", "fsdp")),
    (r".*", PartitionSpec()),
)


class Encoder(LayeredModel):
    """A bidirectional network over one sequence: a BERT or a RoBERTa.

    Norms, softmax and the head are float32, whatever `dtype` is.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        mask: Array | None = None,
        token_types: Array | None = None,
    ) -> Array:
        """Return the logits of each sequence, or its hidden states without a head.

        Args:
          tokens: (B, T) int32.
          positions: rows of the table of positions, (B, T) int32; by default counted as
            transformers counts them.
          mask: (B, T) bool, True at real tokens; padding may be on either side.
          token_types: (B, T) int32; by default 0.

        Returns:
          (B, labels) or (B, T, D), float32.

        Raises:
          InputError: the sequences are longer than the table of positions.
        """
        _check_length(self.config, tokens)
        embed = Embeddings(*self.settings, name="embeddings")
        x = self._encode(embed(tokens, positions, token_types), mask)
        return classify(self.config, self.param_dtype, x)

    def _encode(self, x: Array, mask: Array | None) -> Array:
        """Map embeddings (B, T, D) to hidden states (B, T, D)."""
        context = EncoderContext(None if mask is None else mask[:, None, None, :])
        return self._run_blocks(SelfAttention, x, context)

    def _run_blocks(self, attention: Any, x: Array, context: EncoderContext) -> Array:
        """Apply all layers, whose attention is the module `attention`."""
        settings = (*self.settings, attention)
        numbers = jnp.arange(self.config.num_hidden_layers)
        return self.run_layers(EncoderBlock, settings, x, context, numbers)


def _check_length(config: EncoderConfig, tokens: Array) -> None:
    """Refuse sequences (B, T) longer than the table of positions."""
    longest = config.longest
    if longest is not None and tokens.shape[1] > longest:
        raise InputError(
            f"sequences of {tokens.shape[1]} tokens are longer than the {longest} "
            "positions of the model; make them shorter"
        )
