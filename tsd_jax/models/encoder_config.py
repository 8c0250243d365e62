"""The config of an encoder, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
from jax import Array

from tsd_jax.core.errors import InputError
from tsd_jax.models.config import check_positive

REGRESSION = "regression"
CLASSIFICATION = "single_label_classification"
PROBLEM_TYPES = {"classification": CLASSIFICATION, "regression": REGRESSION}
"""{kind of task: its name in config.json}."""


def _exact_gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=False)


# Named as in Hugging Face's models, where "gelu" is the exact one.
ENCODER_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": _exact_gelu,
    "gelu_new": nn.gelu,
    "gelu_fast": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": nn.tanh,
}


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """The config of DeBERTa's convolution, which is added after the first layer.

    Attributes:
      width: of the kernel, odd.
      groups: groups of channels.
      activation: a key of `ENCODER_ACTIVATIONS`.

    Raises:
      InputError: the width is even, or the activation is unknown.
    """

    width: int
    groups: int = 1
    activation: str = "tanh"

    def __post_init__(self) -> None:
        check_positive(self)
        _check_activation("conv_act", self.activation)
        if self.width % 2 == 0:
            raise InputError(
                f"conv_kernel_size is {self.width}, and only odd sizes keep the "
                "length: choose another checkpoint"
            )


@dataclasses.dataclass(frozen=True)
class DisentangledConfig:
    """The config of attention to relative positions (arXiv:2006.03654).

    Attributes:
      max_relative_positions: the largest distance; farther tokens count as this far.
      position_buckets: number of buckets; distances past half of it share buckets of
        logarithmic width. None for a bucket for every distance.
      content_to_position: score contents against positions.
      position_to_content: score positions against contents.
      share_att_key: project positions with the projections of content.
      norm_embeddings: normalise the table of positions.

    Raises:
      InputError: a number is not positive.
    """

    max_relative_positions: int
    position_buckets: int | None = None
    content_to_position: bool = True
    position_to_content: bool = True
    share_att_key: bool = True
    norm_embeddings: bool = True

    def __post_init__(self) -> None:
        check_positive(self)

    @property
    def span(self) -> int:
        """Half the number of rows in the table of positions."""
        return self.position_buckets or self.max_relative_positions


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The config of an encoder; with the defaults it is a BERT.

    The fields up to `layer_norm_eps` are named as in Hugging Face's config.json; a
    `type_vocab_size` of 0 means no token types.

    Attributes:
      model_type: the family, which decides how tensors are named in files.
      hidden_act: a key of `ENCODER_ACTIVATIONS`.
      pooler_act: a key of `ENCODER_ACTIVATIONS`.
      head: a key of `tsd_jax.models.encoder_blocks.HEADS`.
      pad_token_id: the token of padding.
      counted_positions: count positions from `pad_token_id` + 1 along the tokens that
        are not padding (RoBERTa).
      absolute_positions: add embeddings of positions to those of tokens.
      embedding_size: width of the embeddings before a projection; None for hidden_size
        and no projection.
      disentangled: attention to relative positions; None for plain attention.
      convolution: added after the first layer; None for none.
      initializer_range: standard deviation of the kernels of a new head.
      num_labels: outputs of the head; 0 for no head, the model then returns its hidden
        states.
      label_names: names of the classes, in order; () where they have none.
      problem_type: `CLASSIFICATION` or `REGRESSION`.

    Raises:
      InputError: a size is not positive, or the values contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    model_type: str = "bert"
    hidden_act: str = "gelu"
    pooler_act: str = "tanh"
    head: str = "pooled"
    pad_token_id: int = 0
    counted_positions: bool = False
    absolute_positions: bool = True
    embedding_size: int | None = None
    disentangled: DisentangledConfig | None = None
    convolution: ConvConfig | None = None
    initializer_range: float = 0.02
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    problem_type: str = CLASSIFICATION

    def __post_init__(self) -> None:
        check_positive(self, zero=("type_vocab_size", "pad_token_id", "num_labels"))
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size ({self.hidden_size}) must be a multiple of "
                f"num_attention_heads ({self.num_attention_heads}): correct the "
                "model's config"
            )
        for name in ("hidden_act", "pooler_act"):
            _check_activation(name, getattr(self, name))
        if self.label_names and len(self.label_names) != self.num_labels:
            raise InputError(
                f"{len(self.label_names)} labels have names, but num_labels is "
                f"{self.num_labels}: correct the model's config"
            )

    @property
    def head_dim(self) -> int:
        """The width of one head of attention."""
        return self.hidden_size // self.num_attention_heads

    @property
    def longest(self) -> int | None:
        """The largest number of tokens in a sequence; None for no limit."""
        if not self.absolute_positions:
            return None
        taken = self.pad_token_id + 1 if self.counted_positions else 0
        return self.max_position_embeddings - taken


def _check_activation(name: str, value: str) -> None:
    if value not in ENCODER_ACTIVATIONS:
        raise InputError(
            f"{name} is {value!r}, and only {', '.join(ENCODER_ACTIVATIONS)} are "
            "supported: choose another checkpoint"
        )
