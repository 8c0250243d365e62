from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.trees import random_pair, small_spec
from tsd_jax.core import types
from tsd_jax.core.adapter import delta, output_scale
from tsd_jax.core.dora import rescaling

checked = pytest.mark.skipif(
    os.environ.get("TSD_JAX_SKIP_SHAPE_CHECKS") == "1", reason="switched off"
)


def test_every_shared_type_says_what_it_is():
    names = {name for name in vars(types) if name[0].isupper()}
    assert names >= {"Batch", "Leaf", "LossFn", "Progress"}


@checked
@pytest.mark.parametrize(
    ("magnitude", "norms"),
    [((7,), (6,)), ((3, 7), (7,)), ((7,), (3, 7))],
    ids=["out", "batch", "no batch"],
)
def test_the_tests_refuse_shapes_that_do_not_fit(magnitude, norms):
    """The annotations are checked here, also under jit; the library checks nothing."""
    for run in (rescaling, jax.jit(rescaling)):
        with pytest.raises(TypeError, match="norms"):
            run(jnp.ones(magnitude), jnp.ones(norms))


@checked
def test_the_tests_refuse_types_that_do_not_fit():
    with pytest.raises(TypeError, match="magnitude"):
        rescaling(jnp.ones(3, int), jnp.ones(3))


def test_fitting_shapes_pass_the_checks():
    kernel = small_spec("tsd", dora=True).kernels[1]
    adapter, directions = random_pair(0, kernel)
    base = jnp.ones(kernel.shape)
    assert delta(adapter, directions, base).shape == kernel.shape
    down, up = jnp.ones((3, 6, 2)), jnp.ones((3, 2, 7))
    scale = output_scale(adapter, base, down, up)
    assert scale is not None
    assert scale.shape == (3, 7)
