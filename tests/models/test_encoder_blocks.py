"""Parts of encoders against NumPy; whole models are held in test_encoder.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.models.encoder_blocks import (
    ConvBranch,
    Embeddings,
    EncoderContext,
    Residual,
    SelfAttention,
    add_convolution,
    classify,
)
from tsd_jax.models.encoder_config import EncoderConfig

RNG = np.random.default_rng(0)
CONFIG = EncoderConfig(11, 6, 8, 1, 2, 9, layer_norm_eps=1e-3)
SETTINGS: Any = (CONFIG, jnp.float32, jnp.float32)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def filled(module: Any, *arguments: Any) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    return jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)


def layer_norm(x, scale, bias):
    x = np.asarray(x, np.float64)
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    return unit * np.asarray(scale) + np.asarray(bias)


@pytest.mark.parametrize("counted", [True, False])
def test_embeddings_are_a_normalised_sum(counted):
    config = dataclasses.replace(CONFIG, counted_positions=counted, pad_token_id=1)
    tokens, types = np.asarray([[1, 5, 1, 7]]), np.asarray([[0, 0, 1, 1]])
    module: Any = Embeddings(config, jnp.float32, jnp.float32)
    params = filled(module, tokens, None, types)
    # RoBERTa counts the real tokens from 2, and padding is at the padding id.
    rows = [[1, 2, 1, 3]] if counted else [[0, 1, 2, 3]]
    total = sum(
        params[f"{name}_embeddings"]["embedding"][index]
        for name, index in (("word", tokens), ("position", rows), ("token_type", types))
    )
    found = module.apply({"params": params}, tokens, None, types)
    expected = layer_norm(total, **params["LayerNorm"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_the_formula_over_the_mask():
    x, mask = normal(1, 4, 6), np.asarray([True, True, False, True])
    module: Any = SelfAttention(*SETTINGS)
    context = EncoderContext(jnp.asarray(mask)[None, None, None, :])
    params = filled(module, x, context)
    query, key, value = (
        (x[0] @ params[name]["kernel"] + params[name]["bias"]).reshape(4, 2, 3)
        for name in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("tnh,snh->nts", query, key) / np.sqrt(3)) * mask
    weights = scores / scores.sum(-1, keepdims=True)
    expected = np.einsum("nts,snh->tnh", weights, value).reshape(1, 4, 6)
    found = module.apply({"params": params}, x, context)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_residual_is_projected_added_and_normalised():
    x, stream = normal(1, 2, 8), normal(1, 2, 6)
    module: Any = Residual(*SETTINGS)
    params = filled(module, x, stream)
    added = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    expected = layer_norm(stream + added, **params["LayerNorm"])
    found = module.apply({"params": params}, x, stream)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_is_added_and_padding_is_zero():
    x, kept = normal(1, 3, 6), np.asarray([[[True], [True], [False]]])
    added = jnp.asarray(normal(1, 3, 6))
    scale, bias = jnp.asarray(normal(6)), jnp.asarray(normal(6))
    branch = ConvBranch(added, jnp.asarray(kept), scale, bias)
    expected = layer_norm(x + added, branch.scale, branch.bias) * kept
    found = add_convolution(jnp.asarray(x), branch, 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["pooled", "dense", None])
def test_the_head_reads_the_first_token(head):
    labels = 3 if head else 0
    config = dataclasses.replace(CONFIG, num_labels=labels, head=head or "pooled")

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return classify(config, jnp.float32, x)

    x = normal(2, 4, 6)
    params = filled(Head(), x) if head else {}
    found: Any = Head().apply({"params": params}, x)
    if head is None:
        np.testing.assert_array_equal(found, x)
        return
    first, last = {
        "pooled": (("pooler", "dense"), ("classifier",)),
        "dense": (("classifier", "dense"), ("classifier", "out_proj")),
    }[head]

    def dense(x, path):
        of = params
        for name in path:
            of = of[name]
        return x @ of["kernel"] + of["bias"]

    expected = dense(np.tanh(dense(x[:, 0], first)), last)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
