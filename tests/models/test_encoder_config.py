from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.models.encoder_config import (
    ENCODER_ACTIVATIONS,
    ConvConfig,
    DisentangledConfig,
    EncoderConfig,
)

CONFIG = EncoderConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=40,
    num_labels=3,
    label_names=("bad", "good", "odd"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size.*multiple"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_labels": 2}, "3 labels have names"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_convolution_that_changes_the_length_is_refused():
    assert ConvConfig(3).groups == 1
    with pytest.raises(InputError, match=r"conv_kernel_size is 4, .*odd"):
        ConvConfig(4)
    with pytest.raises(InputError, match="conv_act is 'mish'"):
        ConvConfig(3, activation="mish")


def test_the_table_of_positions_has_a_row_for_each_bucket_and_sign():
    assert DisentangledConfig(512).span == 512
    assert DisentangledConfig(512, position_buckets=256).span == 256
    with pytest.raises(InputError, match="max_relative_positions must be positive"):
        DisentangledConfig(0)


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({}, 40),
        ({"counted_positions": True, "pad_token_id": 1}, 38),
        ({"absolute_positions": False}, None),
    ],
)
def test_positions_limit_the_length(change, longest):
    assert dataclasses.replace(CONFIG, **change).longest == longest


def test_gelu_is_the_exact_one():
    # At 1: the standard normal distribution function there, Φ(1).
    exact, tanh = (ENCODER_ACTIVATIONS[n](jnp.ones(())) for n in ("gelu", "gelu_new"))
    assert float(exact) == pytest.approx(0.8413447, abs=1e-6)
    assert float(tanh) != pytest.approx(0.8413447, abs=1e-5)
