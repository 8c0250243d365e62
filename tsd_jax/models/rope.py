"""Scalings of rotary positions, for sequences longer than a model was trained on.

Each is a frozen dataclass with the fields of Hugging Face's `rope_parameters`;
`ROPE_TYPES` names them all. H is the rotated width of a head, and i < H/2 counts its
pairs of channels.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from tsd_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling(abc.ABC):
    """A change of the angles position · theta^(-2i/H).

    Raises:
      InputError: a number is not positive.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(n is None or isinstance(n, bool) or n > 0 for n in numbers):
                raise InputError(
                    f"{field.name} of the rotary embedding must be positive, not "
                    f"{value}: correct the model's config"
                )

    def check(self, width: int, theta: float) -> None:
        """Check that this scaling is defined for these heads.

        Args:
          width: H, the rotated width of a head.
          theta: base of the frequencies.

        Raises:
          InputError: it is not.
        """
        del width, theta  # defined for all heads, unless a subclass says otherwise

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin."""
        return 1.0

    @abc.abstractmethod
    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return the angle per position of each pair, (H/2,) float32.

        Args:
          width: H, the rotated width of a head.
          theta: base of the frequencies.
          length: largest position of the call plus one, () int32.
        """


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Linear scaling: divides every position by `factor`."""

    factor: float

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta^(-2i/H) / factor."""
        del length
        return jnp.asarray(_plain(width, theta) / np.float32(self.factor))


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK scaling: theta grows with the length of a call past the trained one.

    Cached keys keep the rotation they were given, so decoding past the trained length
    differs from one forward pass over all tokens, as it does in transformers.
    """

    factor: float
    max_position_embeddings: int

    def check(self, width: int, theta: float) -> None:
        """Refuse heads of one pair: the exponent of theta would divide by zero."""
        if width <= 2:
            raise _unfit(f"dynamic scaling needs a rotated width over 2, not {width}")

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta'^(-2i/H), theta' = theta (f n / N - f + 1)^(H / (H - 2))."""
        trained = self.max_position_embeddings
        longest = jnp.maximum(length, trained).astype(jnp.float32)
        stretch = self.factor * longest / trained - (self.factor - 1)
        base = theta * stretch ** (width / (width - 2))
        return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3 scaling: divides low frequencies by `factor`, and keeps high ones."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def check(self, width: int, theta: float) -> None:
        """Refuse limits with nothing between them."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise _unfit(f"high_freq_factor {high} must exceed low_freq_factor {low}")

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Blend by the number of rotations within the trained length."""
        del length
        plain = _plain(width, theta)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return jnp.asarray(_blend(plain, self.factor, kept))


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN: divides low frequencies, keeps high ones, and sharpens attention."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def check(self, width: int, theta: float) -> None:
        """Refuse a theta that gives all pairs one frequency."""
        if not theta > 1:
            raise _unfit(f"yarn scaling needs a rope_theta above 1, not {theta}")

    @property
    def magnitude(self) -> float:
        """The attention factor, by default 1 + log(factor) / 10."""
        if self.attention_factor is not None:
            return self.attention_factor

        def grown(scale: float) -> float:
            return 1.0 + 0.1 * scale * math.log(max(self.factor, 1.0))

        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Blend linearly between the pairs of beta_fast and beta_slow rotations."""
        del length

        def pair(turns: float) -> float:
            """Return the index of the pair with this many rotations, as a float."""
            wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(wave) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = last + 0.001 if first == last else last
        ramp = (np.arange(width // 2, dtype=np.float32) - first) / (last - first)
        kept = 1 - np.clip(ramp, 0, 1)
        return jnp.asarray(_blend(_plain(width, theta), self.factor, kept))


@dataclasses.dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE: divides each frequency by its own factor, another for long calls.

    As with `DynamicScaling`, cached keys keep the rotation they were given.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def check(self, width: int, theta: float) -> None:
        """Refuse other than one factor for each pair, and a trained length below 2."""
        for name in ("short_factor", "long_factor"):
            number = len(getattr(self, name))
            if number != width // 2:
                raise _unfit(f"{name} has {number} entries for {width // 2} pairs")
        if self.original_max_position_embeddings < 2:
            raise _unfit("original_max_position_embeddings must be 2 or more")

    @property
    def magnitude(self) -> float:
        """The attention factor, by default √(1 + log factor / log length)."""
        if self.attention_factor is not None:
            return self.attention_factor
        length = self.original_max_position_embeddings
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(length))

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta^(-2i/H) / factor_i, with the short or the long factors."""
        plain = _plain(width, theta)
        short, long = (
            jnp.asarray(plain / np.asarray(each, np.float32))
            for each in (self.short_factor, self.long_factor)
        )
        return jnp.where(length > self.original_max_position_embeddings, long, short)


ROPE_TYPES: Mapping[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRope,
}


def _unfit(fault: str) -> InputError:
    return InputError(f"rotary embedding: {fault}; correct the model's config")


def _plain(width: int, theta: float) -> np.ndarray:
    """Return theta^(-2i/H), (H/2,) float32."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return 1 / np.float32(theta) ** exponents


def _blend(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Return frequencies of which the fraction `kept` is not divided by `factor`."""
    return (plain * (kept + (1 - kept) / factor)).astype(np.float32)
