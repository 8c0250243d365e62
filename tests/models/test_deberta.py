"""Relative positions of a DeBERTa by hand; its logits are held in test_encoder.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.models.deberta import Deberta, position_rows
from tsd_jax.models.encoder_config import DisentangledConfig, EncoderConfig


def test_buckets_are_logarithmic():
    """By hand: mid 4, longest 16; ceil(log(d/4) / log(15/4) · 3) + 4."""
    rows = position_rows(20, DisentangledConfig(16, position_buckets=8))
    # d:        0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    by_hand = [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, 7, 7, 7, 7, 7, 7]
    np.testing.assert_array_equal(rows[:16, 0] - 8, by_hand)
    np.testing.assert_array_equal(rows[0, :16] - 8, [-bucket for bucket in by_hand])
    assert rows.max() == 15  # farther ones are cut to the table
    assert rows.min() == 0


def test_without_buckets_distances_are_cut():
    rows = position_rows(6, DisentangledConfig(3))
    np.testing.assert_array_equal(rows[:, 0], [3, 4, 5, 5, 5, 5])
    np.testing.assert_array_equal(rows[0], [3, 2, 1, 0, 0, 0])


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("terms", [(True, True), (True, False), (False, False)])
def test_scores_are_equation_4(shared, terms):
    """The attention of the only layer in NumPy, one pair of tokens at a time."""
    length, heads, width = 4, 2, 3
    attention = DisentangledConfig(
        3,
        content_to_position=terms[0],
        position_to_content=terms[1],
        share_att_key=shared,
        norm_embeddings=False,
    )
    config = EncoderConfig(
        11, heads * width, 8, 1, heads, type_vocab_size=0, disentangled=attention
    )
    model: Any = Deberta(config, scan_layers=False)
    tokens = np.arange(1, 1 + length)[None]
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes
    )
    _, seen = model.apply(
        {"params": params},
        tokens,
        capture_intermediates=lambda module, _: module.name in ("self", "embeddings"),
    )
    found = seen["intermediates"]["layers_0"]["attention"]["self"]["__call__"][0][0]
    x = np.asarray(seen["intermediates"]["embeddings"]["__call__"][0][0], np.float64)
    own = params["layers_0"]["attention"]["self"]

    def project(name, rows):
        dense = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), own[name])
        out = rows @ dense["kernel"] + dense["bias"]
        return out.reshape(-1, heads, width)

    names = ("query_proj", "key_proj", "value_proj")
    query, key, value = (project(name, x) for name in names)
    table = np.asarray(params["encoder"]["rel_embeddings"]["embedding"], np.float64)
    prefix = "" if shared else "pos_"
    by_name = {
        name: project(f"{prefix if part else ''}{name}_proj", table)
        for name, part in (("key", terms[0]), ("query", terms[1]))
    }
    scores = np.zeros((heads, length, length))
    for i in range(length):
        for j in range(length):
            row = int(np.clip(i - j + 3, 0, 5))
            for n in range(heads):
                score = query[i, n] @ key[j, n]
                if terms[0]:
                    score += query[i, n] @ by_name["key"][row, n]
                if terms[1]:
                    score += key[j, n] @ by_name["query"][row, n]
                scores[n, i, j] = score
    weights = softmax(scores / np.sqrt(width * (1 + terms.count(True))))
    expected = np.einsum("nij,jnh->inh", weights, value).reshape(length, -1)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
