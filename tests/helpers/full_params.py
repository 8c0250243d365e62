"""A small model's full parameters beside adapters, and their names in torch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.helpers.trees import random_all, small_spec
from tsd_jax.core.full_params import FullParam, FullSpec

V, D, LAYERS = 5, 3, 2
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PARTS = {
    "embed_tokens/embedding": FullSpec(
        path="embed_tokens/embedding", shape=(V + 2, D), rows=(V, V + 2)
    ),
    "lm_head/kernel": FullSpec(
        path="lm_head/kernel", shape=(D, V + 2), rows=(V, V + 2), axis=1
    ),
    "layers/norm/scale": FullSpec(path="layers/norm/scale", shape=(LAYERS, D)),
    "layers/up/kernel": FullSpec(path="layers/up/kernel", shape=(LAYERS, D, 4)),
}
NAMES = {
    "embed_tokens/embedding": "model.embed_tokens",
    "lm_head/kernel": "lm_head",
    "layers/norm/scale": "model.layers.{}.norm",
    "layers/up/kernel": "model.layers.{}.up",
    "layers/up/bias": "model.layers.{}.up",
    "k": "model.k",
    "stack": "model.layers.{}.stack",
}


def module_name(path: str, index: int | None) -> str:
    """Return the torch module of a parameter."""
    assert ("{}" in NAMES[path]) == (index is not None)
    return NAMES[path].format(index)


def parts(*paths: str) -> dict[str, FullParam]:
    """Return random values of these full parameters, or of all."""
    rng = np.random.default_rng(4)
    return {
        path: FullParam(
            jnp.asarray(rng.normal(size=PARTS[path].value_shape), "float32"), p
        )
        for path, p in PARTS.items()
        if path in paths or not paths
    }


def trees(*paths: str) -> tuple[Any, Any]:
    """Return random trees of a spec's adapters with these full parameters."""
    trainable, directions = random_all(0, small_spec("tsd"))
    return trainable.replace(full=parts(*paths)), directions
