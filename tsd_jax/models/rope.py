"""How rotary positions are stretched past the length a model was first trained on.

A kind of scaling is a frozen dataclass whose fields are those of Hugging Face's
`rope_parameters`; `ROPE_TYPES` names them all. H is the width that is turned,
and 2i/H below counts its pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from tsd_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Say how the angles position · theta^(-2i/H) are changed.

    Raises:
      InputError: if a number is not positive.
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
        """Refuse a head, or a base of wavelengths, that this cannot be done to.

        Raises:
          InputError: if the angles would not be numbers.
        """

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return the angle per position of each pair, (H/2,) float32.

        Args:
          width: H. theta: base of the wavelengths.
          length: () int32, the largest position of the call and one more.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """Divide every position by `factor`."""

    factor: float

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta^(-2i/H) / factor."""
        del length
        return jnp.asarray(_plain(width, theta) / np.float32(self.factor))


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """Stretch theta with the length of the call, past the trained length.

    Keys in a cache keep the turn they were given, so that decoding past that length
    is not the full forward; it is what transformers does.
    """

    factor: float
    max_position_embeddings: int

    def check(self, width: int, theta: float) -> None:
        """Refuse heads of one pair, whose theta cannot be stretched."""
        if width <= 2:
            raise _unfit(f"dynamic needs heads of 4 or more, not {width}")

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta'^(-2i/H), theta' = theta (f n / N - f + 1)^(H / (H - 2))."""
        trained = self.max_position_embeddings
        reached = jnp.maximum(length, trained).astype(jnp.float32)
        stretch = self.factor * reached / trained - (self.factor - 1)
        base = theta * stretch ** (width / (width - 2))
        return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Divide low frequencies by `factor`, keep high ones, and blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def check(self, width: int, theta: float) -> None:
        """Refuse limits between which nothing lies."""
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise _unfit(f"high_freq_factor {high} must exceed low_freq_factor {low}")

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Blend by how often a wave fits into the trained length."""
        del length
        plain = _plain(width, theta)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return jnp.asarray(_blend(plain, self.factor, kept))


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Divide slow pairs by `factor`, keep fast ones, and sharpen attention."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def check(self, width: int, theta: float) -> None:
        """Refuse a theta that makes all wavelengths one."""
        if not theta > 1:
            raise _unfit(f"yarn needs a rope_theta above 1, not {theta}")

    @property
    def magnitude(self) -> float:
        """Return the attention factor, by default 1 + log(factor) / 10."""
        if self.attention_factor is not None:
            return self.attention_factor

        def grown(scale: float) -> float:
            return 1.0 + 0.1 * scale * math.log(max(self.factor, 1.0))

        if self.mscale and self.mscale_all_dim:
            return grown(self.mscale) / grown(self.mscale_all_dim)
        return grown(1.0)

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Blend linearly from the pair that turns beta_fast times to beta_slow."""
        del length

        def pair(turns: float) -> float:
            """Find the pair that turns so often in the trained length."""
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
    """Divide each pair by a factor of its own, others past the trained length.

    As with `DynamicScaling`, keys in a cache keep the turn they were given.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def check(self, width: int, theta: float) -> None:
        """Refuse factors that are not one for each pair, and a length of nothing."""
        for name in ("short_factor", "long_factor"):
            number = len(getattr(self, name))
            if number != width // 2:
                raise _unfit(f"{name} has {number} numbers for {width // 2} pairs")
        if self.original_max_position_embeddings < 2:
            raise _unfit("original_max_position_embeddings must be 2 or more")

    @property
    def magnitude(self) -> float:
        """Return the attention factor, by default √(1 + log factor / log length)."""
        if self.attention_factor is not None:
            return self.attention_factor
        length = self.original_max_position_embeddings
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(length))

    def frequencies(self, width: int, theta: float, length: Array) -> Array:
        """Return theta^(-2i/H) / factor_i, by the short or the long factors."""
        plain = _plain(width, theta)
        short, far = (
            jnp.asarray(plain / np.asarray(each, np.float32))
            for each in (self.short_factor, self.long_factor)
        )
        return jnp.where(length > self.original_max_position_embeddings, far, short)


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
    """Keep the part `kept` of each frequency, and divide the rest by `factor`."""
    return (plain * (kept + (1 - kept) / factor)).astype(np.float32)
