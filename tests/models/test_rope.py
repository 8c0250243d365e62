"""Scalings of rotary positions against their formulas, one pair at a time."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.models.rope import (
    ROPE_TYPES,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    RopeScaling,
    YarnScaling,
)

WIDTH, THETA = 16, 10000.0
PLAIN = [THETA ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]


def found(scaling: RopeScaling, length: int = 8) -> np.ndarray:
    return np.asarray(scaling.frequencies(WIDTH, THETA, jnp.asarray(length)))


def test_linear_divides_all():
    expected = [frequency / 4 for frequency in PLAIN]
    np.testing.assert_allclose(found(LinearScaling(4.0)), expected, rtol=1e-6)


@pytest.mark.parametrize(("length", "growth"), [(8, 1.0), (32, 1.0), (96, 5.0)])
def test_dynamic_stretches_theta_past_the_trained_length(length, growth):
    """Growth by hand: factor · length / trained - (factor - 1) = 2 · 3 - 1."""
    theta = THETA * growth ** (WIDTH / (WIDTH - 2))
    expected = [theta ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]
    np.testing.assert_allclose(found(DynamicScaling(2.0, 32), length), expected, 1e-5)


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    expected = []
    for frequency in PLAIN:
        turns = 64 * frequency / (2 * math.pi)
        kept = min(max((turns - 1) / (4 - 1), 0), 1)
        expected.append(kept * frequency + (1 - kept) * frequency / 8)
    np.testing.assert_allclose(found(scaling), expected, rtol=1e-5)
    assert expected[0] == PLAIN[0]
    assert expected[-1] == pytest.approx(PLAIN[-1] / 8)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    scaling = YarnScaling(4.0, 1024, beta_fast=8.0, beta_slow=1.0)
    # Pairs with 8 turns and 1 turn in 1024 positions: 2.6 and 4.4, widened to 2 and 5.
    kept = [1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0]
    expected = [
        part * frequency + (1 - part) * frequency / 4
        for part, frequency in zip(kept, PLAIN, strict=True)
    ]
    np.testing.assert_allclose(found(scaling), expected, rtol=1e-5)
    assert scaling.magnitude == pytest.approx(1 + 0.1 * math.log(4))
    own = dataclasses.replace(scaling, attention_factor=1.5)
    assert own.magnitude == 1.5
    both = dataclasses.replace(scaling, mscale=2.0, mscale_all_dim=1.0)
    share = (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4))
    assert both.magnitude == pytest.approx(share)


@pytest.mark.parametrize(("length", "factors"), [(8, "short"), (9, "long")])
def test_longrope_has_a_factor_for_each_pair(length, factors):
    table = {"short": tuple(range(1, 9)), "long": tuple(range(11, 19))}
    scaling = LongRope(table["short"], table["long"], 4.0, 8)
    expected = np.divide(PLAIN, table[factors])
    np.testing.assert_allclose(found(scaling, length), expected, rtol=1e-6)
    assert scaling.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(8)))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (DynamicScaling(2.0, 8), "rotated width over 2, not 2"),
        (Llama3Scaling(8.0, 4.0, 4.0, 8), "high_freq_factor 4.0 must exceed"),
        (
            LongRope((1.0, 1.0), (1.0,), 4.0, 8),
            "short_factor has 2 entries",
        ),
        (
            LongRope((1.0,), (1.0,), 4.0, 1),
            "_embeddings must be 2 or more",
        ),
    ],
)
def test_undefined_scalings_are_refused(scaling, message):
    with pytest.raises(InputError, match=message):
        scaling.check(2, THETA)


def test_yarn_needs_a_theta_above_one():
    with pytest.raises(InputError, match="rope_theta above 1, not 1"):
        YarnScaling(4.0, 8).check(WIDTH, 1.0)


def test_numbers_must_be_positive():
    with pytest.raises(InputError, match="factor of the rotary embedding"):
        LinearScaling(-1.0)
    with pytest.raises(InputError, match="long_factor of the rotary embedding"):
        LongRope((1.0,), (0.0,), 4.0, 8)


def test_every_type_is_tested():
    assert {*ROPE_TYPES} == {"linear", "dynamic", "llama3", "yarn", "longrope"}
