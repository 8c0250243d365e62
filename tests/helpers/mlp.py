"""The smallest model with a wide and a tall kernel, and batches for it."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tests.helpers.oracle import geometric, spectrum_kernel
from tests.helpers.trees import method_of
from tsd_jax.binding.linen import make_spec
from tsd_jax.core.spec import Rule, Spec

TOKENS, WIDTH, HIDDEN, CLASSES = 11, 12, 20, 13
PATHS = ("up/kernel", "down/kernel")
RULES = (
    Rule(pattern="up/kernel", rank=3, directions=5, alpha=6.0),
    Rule(pattern="down/kernel", rank=4, directions=2, alpha=3.0, scaling="rslora"),
)


class Mlp(nn.Module):
    """Embedding, projection to 20, tanh, and projection to 13 classes."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(TOKENS, WIDTH, name="embed")(tokens)
        x = jnp.tanh(nn.Dense(HIDDEN, name="up")(x))
        return nn.Dense(CLASSES, name="down")(x)


def mlp_params(seed: int = 0) -> dict:
    """Return kernels of falling spectra; the last two σ of the tall one are 0."""
    rng = np.random.default_rng(seed)
    falling = geometric(CLASSES, 2.0, 0.05)
    falling[-2:] = 0
    up, _, _ = spectrum_kernel(seed, (WIDTH, HIDDEN), geometric(WIDTH, 2.0, 0.05))
    down, _, _ = spectrum_kernel(seed + 1, (HIDDEN, CLASSES), falling)
    tree = {
        "embed": {"embedding": rng.normal(size=(TOKENS, WIDTH))},
        "up": {"kernel": up, "bias": 0.1 * rng.normal(size=HIDDEN)},
        "down": {"kernel": down, "bias": 0.1 * rng.normal(size=CLASSES)},
    }
    return {
        module: {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}
        for module, leaves in tree.items()
    }


def mlp_spec(params: dict, method: str) -> Spec:
    """Return a spec for both kernels; the first has r < s, the second r > s."""
    return make_spec(
        Mlp().apply,
        {"params": params},
        RULES,
        jnp.zeros((1, 1), jnp.int32),
        method=method_of(method),
    )


def mlp_batch(step: int) -> dict[str, np.ndarray]:
    """Return two micro-batches (2, 4, 6) with different numbers of counted targets."""
    rng = np.random.default_rng(step)
    weights = np.ones((2, 4, 6), np.float32)
    weights[1, 1:, 2:] = 0
    return {
        "tokens": rng.integers(0, TOKENS, (2, 4, 6), np.int32),
        "targets": rng.integers(0, CLASSES, (2, 4, 6), np.int32),
        "weights": weights,
    }
