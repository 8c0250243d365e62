from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.core.ranges import Range, check_ranges, ranges


@dataclass(frozen=True)
class Example:
    """Fields with and without ranges."""

    name: str = "a"
    count: Annotated[int, Range(1, hint="leave it out")] = 1
    rate: Annotated[float, Range(0)] = 0.5
    sizes: tuple[Annotated[int, Range(1, also=(-1,))], ...] = (2, -1)


def test_ranges_are_found_in_annotations():
    found = ranges(Example)
    assert found.keys() == {"count", "rate", "sizes"}
    assert {name: each[1:] for name, each in found.items()} == {
        "count": (True, False),
        "rate": (False, False),
        "sizes": (True, True),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "e.count must be a whole number of at least 1, not 0; leave it"),
        ({"rate": -0.1}, "e.rate must be a finite number of at least 0, not -0.1"),
        ({"sizes": (3, 0)}, "e.sizes must be .* of at least 1 or -1, not 0"),
    ],
)
def test_the_field_is_named(values, message):
    with pytest.raises(InputError, match=f"^{message}"):
        check_ranges(Example(**values), "e.")
    check_ranges(Example(), "e.")


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [
        ("[]", (0, 0.5, 1), (-1e-9, 1.1)),
        ("()", (1e-30, 0.5), (0, 1)),
        ("[)", (0, 0.5), (1,)),
        ("(]", (0.5, 1), (0,)),
    ],
)
def test_ends_are_in_a_range_or_not(ends, inside, outside):
    bounds = Range(0, 1, ends)
    assert all(bounds.holds(value, whole=False) for value in inside)
    assert not any(bounds.holds(value, whole=False) for value in outside)
    assert bounds.told(whole=False) == f"a number in {ends[0]}0, 1{ends[1]}"


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e39, True, "1", None]
)
def test_what_is_no_finite_number_is_in_no_range(value):
    assert not Range(-math.inf, ends="[]").holds(value, whole=False)
    assert not Range(-math.inf, ends="[]").holds(value, whole=True)


def test_a_number_must_hold_as_a_float32_as_well():
    """Half a spacing below 1 it rounds to 1; below the least number, to 0."""
    assert Range(0, 1).holds(1 - 2.0**-24, whole=False)
    assert not Range(0, 1).holds(1 - 2.0**-26, whole=False)
    assert not Range(0, ends="()").holds(1e-50, whole=False)


def test_numpy_numbers_are_numbers():
    assert Range(1).holds(np.int64(3), whole=True)
    assert not Range(1).holds(np.float64(3), whole=True)
    assert Range(1).holds(np.float32(3), whole=False)
    assert not Range(1).holds(np.bool_(True), whole=True)
