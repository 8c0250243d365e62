"""The config of a decoder, for every family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tsd_jax.core.errors import InputError
from tsd_jax.models.layers import ACTIVATIONS
from tsd_jax.models.rope import RopeScaling


def check_positive(config: object, *, zero: Sequence[str] = ()) -> None:
    """Check that every int and float of a config is positive and finite.

    Args:
      config: an instance of a dataclass.
      zero: names of the fields that may also be 0.

    Raises:
      InputError: a number is not.
    """
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        zeros = field.name in zero and value == 0
        if number and not (0 < value < math.inf or zeros):
            raise InputError(
                f"{field.name} must be positive, not {value}: correct the "
                "model's config"
            )


@dataclasses.dataclass(frozen=True)
class Experts:
    """The config of a mixture of experts, the same in every layer.

    Attributes:
      num_experts: experts in each layer.
      num_experts_per_tok: experts that each token is routed to.
      intermediate_size: width of one expert.
      norm_topk_prob: make the weights of a token's experts sum to one.
      shared_intermediate_size: width of the expert that every token goes to; None where
        there is no such expert.

    Raises:
      InputError: a size is not positive, or tokens go to more experts than there are.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool = True
    shared_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_experts_per_tok > self.num_experts:
            raise InputError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                f"the number of experts ({self.num_experts}): correct the model's "
                "config"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The config of a decoder; with the defaults it is a Llama.

    The fields up to `mlp_bias` are named as in Hugging Face's config.json.

    Attributes:
      model_type: the family, which decides how tensors are named in files.
      hidden_act: a key of `ACTIVATIONS`.
      qkv_bias: q, k and v have a bias; with `attention_bias` o has one too.
      rope_scaling: scaling of the rotary positions; None for no scaling.
      partial_rotary_factor: the fraction of each head that is rotated.
      rope_local_theta: theta of windowed layers, which then have no scaling; None for
        the same rotary positions in all layers.
      rope_layers: whether each layer has rotary positions; () for all.
      sliding_window: how many slots a token of a windowed layer attends to, its own
        included; None for no limit.
      window_layers: whether each layer is windowed; () for all.
      qk_norm: normalise each head of queries and keys.
      query_pre_attn_scalar: scores are divided by its square root; None for head_dim.
      attn_logit_softcapping: limit of the attention scores; None for no limit.
      final_logit_softcapping: limit of the logits; None for no limit.
      norm_around_one: norms multiply by 1 + scale.
      post_norms: also normalise the outputs of attention and feed-forward.
      scale_embeddings: multiply embeddings by √hidden_size.
      fused_projections: one kernel for q, k and v, and one for gate and up.
      experts: mixture of experts in place of the feed-forward; None for none.

    Raises:
      InputError: a size is not positive, or the values contradict each other.
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
    model_type: str = "llama"
    hidden_act: str = "silu"
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    rope_local_theta: float | None = None
    rope_layers: tuple[bool, ...] = ()
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    qk_norm: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    norm_around_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    fused_projections: bool = False
    experts: Experts | None = None

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads}): correct the "
                "model's config"
            )
        if self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_dim:
            raise InputError(
                f"head_dim ({self.head_dim}) has {self.rotary_width} rotated channels, "
                "which must be pairs within it: correct the model's config"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"hidden_act is {self.hidden_act!r}, and only "
                f"{', '.join(ACTIVATIONS)} are supported: choose another checkpoint"
            )
        for name in ("rope_layers", "window_layers"):
            length = len(getattr(self, name))
            if length not in (0, self.num_hidden_layers):
                raise InputError(
                    f"{name} has {length} entries, but there are "
                    f"{self.num_hidden_layers} layers: correct the model's config"
                )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_width, self.rope_theta)

    @property
    def rotary_width(self) -> int:
        """The width of the rotated part of each head."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer is windowed."""
        if self.sliding_window is None:
            return (False,) * self.num_hidden_layers
        return self.window_layers or (True,) * self.num_hidden_layers
