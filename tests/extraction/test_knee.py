from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.extraction.knee import knee


def by_hand(rates: np.ndarray, budget: int) -> int:
    """The farthest point from the chord, by perpendicular distance."""
    largest = sorted(rates, reverse=True)[: 2 * budget]
    points = [(j, np.log(rate)) for j, rate in enumerate(largest) if rate > 0]
    (x0, y0), (x1, y1) = points[0], points[-1]
    length = np.hypot(x1 - x0, y1 - y0)
    away = [((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length for x, y in points]
    return int(np.clip(np.argmax(away), 1, budget))


@pytest.mark.parametrize("budget", [8, 4, 3])
def test_it_counts_what_stands_above_a_plateau(budget):
    """Three rates fall steeply, the others hardly; the order they come in is free."""
    falls = np.array([0, 4, 8, 12, 12.5, 13, 13.5, 14, 14.5])
    rates = np.random.default_rng(0).permutation(np.exp(-falls))
    assert int(knee(jnp.asarray(rates), budget)) == by_hand(rates, budget) == 3


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_farthest_from_the_chord(seed):
    rng = np.random.default_rng(seed)
    rates = np.exp(-np.cumsum(rng.exponential(np.geomspace(2, 0.1, 40))))
    assert int(knee(jnp.asarray(rates), 12)) == by_hand(rates, 12)
    scaled = knee(jnp.asarray(1e4 * rates), 12)
    assert int(scaled) == by_hand(rates, 12)


@pytest.mark.parametrize(
    ("rates", "used"),
    [
        ([1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125], 3),
        ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0], 3),
        ([1.0, 0.99, 0.97, 0.9, 0.5, 0.01], 3),
        ([5.0, 1.0, 0, 0, 0, 0], 2),
        ([5.0, 0, 0, 0, 0, 0], 1),
        ([0.0, 0, 0, 0, 0, 0], 1),
        ([5.0, 1e-9, 0.9e-9, 0.8e-9, 0.7e-9, 0.6e-9], 1),
    ],
    ids=["line", "flat", "concave", "two", "one", "none", "a cliff"],
)
def test_where_there_is_no_knee_the_budget_is_used(rates, used):
    assert int(knee(jnp.array(rates), 3)) == used


def test_a_matrix_smaller_than_the_window():
    assert int(knee(jnp.array([1.0, 0.01, 0.009, 0.008]), 4)) == 1
    assert int(knee(jnp.array([3.0]), 1)) == 1
