"""The numbers that shape a decoder, whatever family it is of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tsd_jax.core.errors import InputError
from tsd_jax.models.layers import ACTIVATIONS
from tsd_jax.models.rope import RopeScaling


def check_positive(numbers: object, *, zero: Sequence[str] = ()) -> None:
    """Refuse a dataclass whose ints or floats are not positive; None may be.

    Args:
      numbers: the dataclass. zero: names of fields that may be 0.

    Raises:
      InputError: if one is not.
    """
    for field in dataclasses.fields(numbers):  # pyright: ignore[reportArgumentType]
        value = getattr(numbers, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        zeros = field.name in zero and value == 0
        if number and not (0 < value < math.inf or zeros):
            raise InputError(
                f"{field.name} must be positive, not {value}: correct the "
                "model's config"
            )


@dataclasses.dataclass(frozen=True)
class Experts:
    """Hold the numbers of a mixture of experts, the same in every layer.

    Attributes:
      num_experts: in each layer. num_experts_per_tok: that a token is sent to.
      intermediate_size: width of one expert.
      norm_topk_prob: make the weights of a token's experts sum to one.
      shared_intermediate_size: width of the expert that sees every token; None for
        none.

    Raises:
      InputError: if a size is not positive, or more experts are chosen than there are.
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
    """Hold the numbers that shape a decoder; without the later ones, it is a Llama.

    Attributes:
      vocab_size ... mlp_bias: as Hugging Face names them.
      model_type: of the family, which names the tensors in files.
      hidden_act: a key of `ACTIVATIONS`.
      qkv_bias: biases of q, k and v alone; `attention_bias` has one of o too.
      rope_scaling: of the rotary positions; None for none.
      partial_rotary_factor: the part of each head that is turned.
      rope_local_theta: of windowed layers, without scaling; None for the one theta.
      rope_layers: whether each layer turns its heads; () for all.
      sliding_window: slots that a token of a windowed layer attends to, itself
        among them. window_layers: whether each layer is windowed; () for all.
      qk_norm: normalise each head of queries and keys.
      query_pre_attn_scalar: attention's scale is its -1/2th power; None for head_dim.
      attn_logit_softcapping, final_logit_softcapping: limits; None for none.
      norm_around_one: norms multiply by 1 + scale. post_norms: also normalise what
        attention and feed-forward give. scale_embeddings: by √hidden_size.
      fused_projections: one kernel for q, k, v, and one for gate and up.
      experts: in place of the feed-forward; None for none.

    Raises:
      InputError: if a size is not positive, or the numbers do not fit together.
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
            part = self.partial_rotary_factor
            of = "" if part == 1 else f", or the part {part} of it,"
            raise InputError(
                f"head_dim ({self.head_dim}){of} must be even, for the rotary "
                "embedding turns pairs: correct the model's config"
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
                    f"{name} tells of {length} layers, but there are "
                    f"{self.num_hidden_layers}: correct the model's config"
                )
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_width, self.rope_theta)

    @property
    def rotary_width(self) -> int:
        """The width of each head that is turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Tell of each layer whether it is windowed."""
        if self.sliding_window is None:
            return (False,) * self.num_hidden_layers
        return self.window_layers or (True,) * self.num_hidden_layers
