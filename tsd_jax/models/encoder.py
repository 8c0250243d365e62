"""BERT and RoBERTa in Linen, knowing nothing of adapters; and what encoders share.

The parameter tree, with the layers stacked on a leading axis L by the scan:

    embeddings/{word,position,token_type}_embeddings/embedding
    embeddings/LayerNorm/{scale,bias}                            (D,)
    layers/attention/self/{query,key,value}/{kernel,bias}        (L, D, D), (L, D)
    layers/attention/output/dense/{kernel,bias}                  (L, D, D), (L, D)
    layers/intermediate/dense/{kernel,bias}                      (L, in, out), (L, out)
    layers/output/dense/{kernel,bias}                            (L, in, out), (L, out)
    layers/{attention/,}output/LayerNorm/{scale,bias}            (L, D)
    pooler/dense, classifier                           with a head, of a BERT
    classifier/{dense,out_proj}                        with a head, of a RoBERTa

Without the scan the layers are `layers_0`, `layers_1`, ... and have no axis L.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError
from tsd_jax.models.encoder_blocks import (
    Block,
    Context,
    Embeddings,
    SelfAttention,
    read_out,
)
from tsd_jax.models.encoder_config import EncoderConfig

_WIDENING = r"(attention/self/\w+|intermediate/dense)/kernel"
_NARROWING = r"(attention/)?output/dense/kernel"

# As of decoders: inner axes on fsdp, heads and feed-forward columns on tensor.
ENCODER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embeddings/word_embeddings/embedding", PartitionSpec("tensor", "fsdp")),
    (rf"layers/{_WIDENING}", PartitionSpec(None, "fsdp", "tensor")),
    (rf"layers/{_NARROWING}", PartitionSpec(None, "tensor", "fsdp")),
    (rf"layers_\d+/{_WIDENING}", PartitionSpec("fsdp", "tensor")),
    (rf"layers_\d+/{_NARROWING}", PartitionSpec("tensor", "fsdp")),
    (r".*", PartitionSpec()),
)


class Encoder(nn.Module):
    """Read a sequence both ways: a BERT, or a RoBERTa.

    Attributes:
      config: the numbers that shape the model.
      dtype: of the computation; norms, softmax and the head are float32.
      param_dtype: of the parameters that `init` makes.
      scan_layers: stack the layers' parameters and compile one block, not L.
      remat: keep only each block's input for the gradient and recompute the rest.
    """

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
        """Return the logits of each sequence, or without a head its hidden states.

        Args:
          tokens: (B, T) int32.
          positions: (B, T) int32, rows of the table of positions; by default as
            transformers counts them.
          mask: (B, T) bool, True at real tokens; padding may stand on either side.
          token_types: (B, T) int32; by default 0.

        Returns:
          (B, labels) or (B, T, D), float32.

        Raises:
          InputError: the sequences are longer than the table of positions.
        """
        check_length(self.config, tokens)
        settings = (self.config, self.dtype, self.param_dtype)
        embed = Embeddings(*settings, name="embeddings")
        x = embed(tokens, positions, token_types)
        context = Context(None if mask is None else mask[:, None, None, :])
        x = run_layers(self, SelfAttention, x, context)
        return read_out(self.config, self.param_dtype, x)


def check_length(config: EncoderConfig, tokens: Array) -> None:
    """Refuse sequences (B, T) longer than the model has positions for."""
    longest = config.longest
    if longest is not None and tokens.shape[1] > longest:
        raise InputError(
            f"sequences of {tokens.shape[1]} tokens: the model has positions for "
            f"{longest}; make them shorter"
        )


def run_layers(
    network: Any, mixing: type[nn.Module], x: Array, context: Context
) -> Array:
    """Send (B, T, D) through all blocks of a network, within its `__call__`.

    Args:
      network: has config, dtype, param_dtype, scan_layers and remat.
      mixing: the module that attends. x: the stream. context: of every layer.
    """
    config = network.config
    settings = (config, network.dtype, network.param_dtype, mixing)
    block: Any = Block
    if network.remat:
        # In a scan nothing can be merged across iterations, so no barrier.
        block = nn.remat(Block, prevent_cse=not network.scan_layers)
    numbers = jnp.arange(config.num_hidden_layers)
    if not network.scan_layers:
        for layer in range(config.num_hidden_layers):
            x, _ = block(*settings, name=f"layers_{layer}")(x, context, numbers[layer])
        return x
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=cast(Any, (nn.broadcast, 0)),  # the context is not scanned over
        length=config.num_hidden_layers,
    )
    x, _ = scanned(*settings, name="layers")(x, context, numbers)
    return x
