"""Ranges of numbers: declared beside the types of a dataclass, checked in one place.

steps: Annotated[int, Range(1)]
mesh: tuple[Annotated[int, Range(1, also=(-1,))], ...]
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np

from tsd_jax.core.errors import InputError


@dataclass(frozen=True)
class Range:
    """The finite numbers between two ends; of an int's annotation, the whole ones.

    Attributes:
      low: lower end.
      high: upper end.
      ends: a bracket for each end, "[" or "]" where it is in the range.
      also: other numbers that are allowed.
      hint: the way out of a frequent mistake, for the message.
    """

    low: float
    high: float = math.inf
    ends: str = "[)"
    also: tuple[int, ...] = ()
    hint: str = ""

    def holds(self, value: Any, *, whole: bool) -> bool:
        """Return whether a value is a number of this range, also as a float32.

        Args:
          value: of any type; bools are no numbers.
          whole: whether it must be an integer.
        """
        kind = numbers.Integral if whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        if value in self.also:
            return True
        with np.errstate(over="ignore", under="ignore"):
            held = [value] if whole else [value, float(np.float32(value))]
        return all(math.isfinite(x) and self._inside(x) for x in held)

    def _inside(self, value: Any) -> bool:
        low = self.low < value or (self.low == value and self.ends[0] == "[")
        high = value < self.high or (self.high == value and self.ends[1] == "]")
        return bool(low and high)

    def told(self, *, whole: bool) -> str:
        """Return the range in words, as they follow "must be".

        Args:
          whole: whether only integers are in it.
        """
        kind = "a whole number" if whole else "a number"
        text = f"{kind} in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        if math.isinf(self.high):
            bound = "of at least" if self.ends[0] == "[" else "above"
            kind = kind if whole else "a finite number"
            text = f"{kind} {bound} {self.low}"
        return " or ".join([text, *map(str, self.also)])


Count = Annotated[int, Range(1)]
"""How many of something, at least one."""

Limit = Annotated[int, Range(0)]
"""How many of something; 0 has a meaning of its own."""

Positive = Annotated[float, Range(0, ends="()")]
"""A finite number above 0."""

Amount = Annotated[float, Range(0)]
"""A finite number of at least 0."""

Share = Annotated[float, Range(0, 1)]
"""A part of a whole, but not all of it."""

Proportion = Annotated[float, Range(0, 1, "(]")]
"""A part of a whole, or all of it."""


def check_ranges(owner: Any, prefix: str = "") -> None:
    """Raise InputError unless all numbers of a dataclass lie in their ranges.

    Args:
      owner: instance of a dataclass with annotated fields.
      prefix: what comes before a field's name in the message, such as "train.".
    """
    for name, (bounds, whole, many) in ranges(type(owner)).items():
        value = getattr(owner, name)
        for each in value if many else (value,):
            if not bounds.holds(each, whole=whole):
                told = bounds.told(whole=whole)
                hint = f"; {bounds.hint}" if bounds.hint else ""
                raise InputError(f"{prefix}{name} must be {told}, not {each!r}{hint}")


@functools.cache
def ranges(kind: type) -> dict[str, tuple[Range, bool, bool]]:
    """Return {field: (its range, whether it is whole, whether it is a tuple of them)}.

    Args:
      kind: a dataclass.
    """
    return dict(_ranges(kind))


def _ranges(kind: type) -> Iterator[tuple[str, tuple[Range, bool, bool]]]:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        many = get_origin(hint) is tuple
        hint = get_args(hint)[0] if many else hint
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, Range):
                yield name, (extra, get_args(hint)[0] is int, many)
