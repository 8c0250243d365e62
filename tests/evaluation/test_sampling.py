from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.sampling import Sampling, draw, likely

LOGITS = np.random.default_rng(0).normal(size=(3, 9)) * 2


def filtered(logits, temperature, top_k, top_p):
    """The distribution of one row in float64, token by token from the likeliest."""
    chance = np.exp(logits / temperature)
    order = np.argsort(-logits)[: top_k or len(logits)]
    chance[np.setdiff1d(np.arange(len(logits)), order)] = 0
    chance /= chance.sum()
    total = 0.0
    for token in order:
        if total >= top_p:
            chance[token] = 0
        else:
            total += chance[token]
    return chance / chance.sum()


CUTS = [(0.7, 0, 1.0), (1.0, 3, 1.0), (2.0, 0, 0.8), (1.3, 6, 0.6), (1.0, 20, 1e-9)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CUTS)
def test_chances_are_those_of_the_likely_part(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = jax.nn.softmax(likely(jnp.asarray(LOGITS, jnp.float32), sampling), axis=-1)
    expected = [filtered(row, temperature, top_k, top_p) for row in LOGITS]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ((np.asarray(found) == 0) == (np.asarray(expected) == 0)).all()


def test_equally_likely_tokens_stay_together():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0]])
    kept = np.isfinite(likely(logits, Sampling(top_k=2)))
    assert kept.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[3]])
def test_draws_follow_their_distribution(cut):
    count = 20_000
    sampling = Sampling(temperature=cut[0], top_k=cut[1], top_p=cut[2])
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0], jnp.float32), (count, 9))
    key, numbers = jax.random.key(0), jnp.arange(count)
    first, second = (
        np.asarray(draw(logits, sampling, key, numbers, jnp.asarray(step)))
        for step in (0, 1)
    )
    both = np.zeros((9, 9))
    np.add.at(both, (first, second), 1 / count)
    chance = filtered(LOGITS[0], *cut)
    # Five standard deviations of the most uncertain frequency; steps are independent.
    np.testing.assert_allclose(both, chance[:, None] * chance, atol=0.018)
    assert not both[chance == 0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a number above 0"),
        ({"temperature": float("inf")}, "temperature must be a number above 0"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1.5"),
    ],
)
def test_what_is_no_distribution_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        Sampling(**change)
