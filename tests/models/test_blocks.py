"""Parts of a decoder layer against NumPy; whole models are held in test_decoder.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.models.blocks import MLP, AttentionInputs, LayerKind, MoE
from tsd_jax.models.config import DecoderConfig, Experts

CONFIG = DecoderConfig(11, 6, 8, 1, 2, 1, 4)
X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)


def filled(module: Any) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(x, gate, up, down):
    return (silu(x @ gate) * (x @ up)) @ down


def kernels(params) -> list[np.ndarray]:
    names = ("gate_proj", "up_proj", "down_proj")
    return [np.asarray(params[name]["kernel"], np.float64) for name in names]


@pytest.mark.parametrize("width", [None, 5])
def test_feed_forward_is_the_formula(width):
    module: Any = MLP(CONFIG, jnp.float32, jnp.float32, width)
    params = filled(module)
    assert params["up_proj"]["kernel"].shape == (6, width or 8)
    found = module.apply({"params": params}, X)
    np.testing.assert_allclose(found, mlp(X, *kernels(params)), rtol=2e-5, atol=1e-5)


def test_a_fused_projection_is_gate_then_up():
    config = dataclasses.replace(CONFIG, fused_projections=True)
    module: Any = MLP(config, jnp.float32, jnp.float32)
    params = filled(module)
    gate, up = np.split(params["gate_up_proj"]["kernel"], 2, axis=-1)
    expected = mlp(X, gate, up, params["down_proj"]["kernel"])
    found = module.apply({"params": params}, X)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shared", [None, 4])
def test_each_token_mixes_its_best_experts(normalised, shared):
    """Experts computed one token at a time, only those it is routed to."""
    config = dataclasses.replace(CONFIG, experts=Experts(4, 2, 5, normalised, shared))
    module: Any = MoE(config, jnp.float32, jnp.float32)
    params = filled(module)
    found = np.asarray(module.apply({"params": params}, X))
    for place in np.ndindex(2, 3):
        x = X[place].astype(np.float64)
        scores = np.exp(x @ params["gate"]["kernel"])
        scores /= scores.sum()
        best = np.argsort(-scores)[:2]
        weights = scores[best] / (scores[best].sum() if normalised else 1)
        stacks = kernels(params["experts"])
        expected = sum(
            weight * mlp(x, *(stack[expert] for stack in stacks))
            for weight, expert in zip(weights, best, strict=True)
        )
        if shared:
            gate = 1 / (1 + np.exp(-x @ params["shared_expert_gate"]["kernel"]))
            expected = expected + gate * mlp(x, *kernels(params["shared_expert"]))
        np.testing.assert_allclose(found[place], expected, rtol=2e-4, atol=1e-4)


def inputs(**changes: Any) -> AttentionInputs:
    full = AttentionInputs(
        cos=jnp.full((1, 2, 1, 4), 0.5),
        sin=jnp.full((1, 2, 1, 4), 0.25),
        mask=jnp.asarray([[[[True, False], [True, True]]]]),
        index=None,
    )
    return dataclasses.replace(full, **changes)


@pytest.mark.parametrize("windowed", [True, False])
def test_a_windowed_layer_selects_its_own_tables_and_mask(windowed):
    tables = (jnp.full((1, 2, 1, 4), 0.125), jnp.full((1, 2, 1, 4), 0.75))
    window = jnp.asarray([[[[True, False], [False, True]]]])
    both = inputs(window_tables=tables, window_mask=window)
    chosen = both.select(LayerKind(windowed=jnp.asarray(windowed), rotary=None))
    assert float(chosen.cos[0, 0, 0, 0]) == (0.125 if windowed else 0.5)
    assert float(chosen.sin[0, 0, 0, 0]) == (0.75 if windowed else 0.25)
    np.testing.assert_array_equal(chosen.mask, window if windowed else both.mask)


def test_a_layer_without_rotary_positions_rotates_by_nothing():
    chosen = inputs().select(LayerKind(windowed=None, rotary=jnp.asarray(False)))
    np.testing.assert_array_equal(chosen.cos, 1)
    np.testing.assert_array_equal(chosen.sin, 0)
    same = inputs().select(LayerKind(windowed=None, rotary=None))
    np.testing.assert_array_equal(same.cos, 0.5)
