"""The stack of layers against a loop in Python, on a block of one multiplication."""

from __future__ import annotations

import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.models.base import LayeredModel, ModelPart

LAYERS = 3
X = np.asarray([[1.0, 2.0]])
OWN = np.asarray([0.5, -1.0, 2.0])


class Affine(ModelPart):
    """x · scale + shared · own, with a scale of its own in every layer."""

    @nn.compact
    def __call__(self, x, shared, own):
        scale = self.param("scale", nn.initializers.ones, (2,), self.param_dtype)
        return x * scale[None] + shared * own, None


class Stack(LayeredModel):
    @nn.compact
    def __call__(self, x, shared, own):
        return self.run_layers(Affine, self.settings, x, shared, own)


CONFIG = types.SimpleNamespace(num_hidden_layers=LAYERS)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_layers_follow_each_other_with_shared_and_own_inputs(scan_layers, remat):
    model = Stack(CONFIG, scan_layers=scan_layers, remat=remat)
    scales = np.arange(1.0, 1 + 2 * LAYERS).reshape(LAYERS, 2)
    expected = X
    for scale, own in zip(scales, OWN, strict=True):
        expected = expected * scale + 10 * own
    params = {"layers": {"scale": jnp.asarray(scales, jnp.float32)}}
    if not scan_layers:
        params = {f"layers_{n}": {"scale": row} for n, row in enumerate(scales)}
    arguments = (jnp.asarray(X), jnp.asarray(10.0), jnp.asarray(OWN))
    found: Any = model.apply({"params": params}, *arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


def test_a_part_creates_projections_in_its_number_types():
    class Part(ModelPart):
        @nn.compact
        def __call__(self, x):
            return self.dense(4, "up", use_bias=False)(x), self.dense(3, "down")(x)

    part = Part(None, jnp.bfloat16, jnp.float32)
    made: Any = part.init_with_output(jax.random.key(0), jnp.ones((1, 2)))
    (up, down), params = made
    assert part.settings == (None, jnp.bfloat16, jnp.float32)
    assert (up.shape, down.shape) == ((1, 4), (1, 3))
    assert up.dtype == down.dtype == jnp.bfloat16
    assert {*params["params"]["up"]} == {"kernel"}
    assert {*params["params"]["down"]} == {"kernel", "bias"}
    assert params["params"]["up"]["kernel"].dtype == jnp.float32
