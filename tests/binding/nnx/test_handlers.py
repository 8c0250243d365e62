from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tsd_jax.binding.nnx.handlers import HANDLERS

RNGS = nnx.Rngs(0)
MODULES = {
    "linear": nnx.Linear(4, 5, use_bias=False, rngs=RNGS),
    "general": nnx.LinearGeneral(
        (3, 4), (2, 5), axis=(-2, -1), use_bias=False, rngs=RNGS
    ),
    "einsum": nnx.Einsum("...hd,hde->...he", (3, 4, 5), rngs=RNGS),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_subscripts_are_what_the_module_computes(module):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    call = HANDLERS[type(module)](module, x)
    labels = call.contraction
    kernel = np.asarray(module.kernel.get_value(), np.float64)
    text = f"{labels.x},{labels.kernel}->{labels.y}"
    want = np.einsum(text, np.asarray(x, np.float64), kernel)
    np.testing.assert_allclose(module(x), want, rtol=1e-5, atol=1e-5)
    assert call.bias is None
