"""What a spec knows of its model's calls."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from tsd_jax.binding.calls import Site
from tsd_jax.binding.linen import make_spec
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import Rule


class Pair(nn.Module):
    """Return a product among other things, of an input among others."""

    twice: bool = False

    @nn.compact
    def __call__(self, skip, pair):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (4, 3))
        y = jnp.einsum("bi,io->ob", pair["b"], kernel)
        if self.twice:
            y = y + (pair["a"] @ kernel).T
        return {"skip": skip, "y": (y,)}


def spec_of(model: nn.Module):
    x = jnp.ones((2, 4))
    args = (x, {"a": x, "b": x})
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    rules = [Rule(pattern="kernel", rank=1, directions=1)]
    return make_spec(model.apply, variables, rules, *args)


def test_a_site_says_which_input_which_output_and_how():
    (kernel,) = spec_of(Pair()).kernels
    (site,) = kernel.calls
    assert site == Site(
        f"{__name__}.Pair.__call__", "['pair']['b']", "['y'][0]", "ab,bc->ca"
    )


def test_two_inputs_of_one_call_are_two_sites():
    (kernel,) = spec_of(Pair(twice=True)).kernels
    assert {site.argument for site in kernel.calls} == {
        "['pair']['a']",
        "['pair']['b']",
    }
    assert all(site.more for site in kernel.calls)


def test_one_input_twice_is_refused():
    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(1.0), (4, 3))
            return x @ kernel + x @ kernel

    x = jnp.ones((2, 4))
    variables = jax.eval_shape(Doubled().init, jax.random.key(0), x)
    rules = [Rule(pattern="kernel", rank=1, directions=1)]
    with pytest.raises(InputError, match="kernel is contracted 2 times by one call"):
        make_spec(Doubled().apply, variables, rules, x)
