"""Drawn adapters of stock PEFT equal it in, out again and merged, or are refused."""

from __future__ import annotations

import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from tests.helpers.exactness import Draws

# `python bench/exactness.py --draws 1000` runs more of them.
SEEDS = range(2000, 2030)


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    return functools.cache(Draws(tmp_path_factory.mktemp("draws")).run)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_adapter_is_equal_or_refused_in_one_line(draw, seed):
    drawn = draw(seed)
    for way, answer in drawn["answers"].items():
        if isinstance(answer, str):
            assert "\n" not in answer, drawn
        else:
            assert answer < 2e-4, (way, drawn)


def test_most_are_not_refused(draw):
    """What refuses everything would pass above."""
    answers = [draw(seed)["answers"]["peft in"] for seed in SEEDS[:11]]
    assert sum(isinstance(each, float) for each in answers) >= 6
