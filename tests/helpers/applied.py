"""Compiled calls of a model, compiled once for each model and shape."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def forward(
    model: Any, params: Any, tokens: Any, positions: Any = None, mask: Any = None
) -> Any:
    """Return the logits of a decoder."""
    return model.apply({"params": params}, tokens, positions, mask)


@functools.partial(jax.jit, static_argnums=0)
def decode(
    model: Any,
    params: Any,
    cache: Any,
    tokens: Any,
    positions: Any = None,
    mask: Any = None,
) -> tuple[Any, Any]:
    """Return the logits of tokens that follow those of a decoder's cache, and it."""
    variables = {"params": params, **cache}
    return model.apply(variables, tokens, positions, mask, decode=True, mutable="cache")


def check_gradients(plain: Any, again: Any) -> None:
    """Check that two trees of gradients are finite and equal to rounding."""
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        scale = float(np.abs(one).max())
        assert np.isfinite(scale)
        np.testing.assert_allclose(one, other, atol=1e-4 * scale + 1e-6, rtol=1e-3)
