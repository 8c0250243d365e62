from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import inputs, net, three_ways
from tests.helpers.trees import method_of, random_all
from tsd_jax.binding.calls import Call
from tsd_jax.binding.linen import make_spec
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule

KERNEL = Rule(pattern=".*kernel", rank=2, directions=2)
KERNEL_OF_LINEAR = Rule(pattern="weight", rank=2, directions=2)


class Quadratic(nn.Module):
    """A linear module no handler knows: y = (x K)^2."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (x.shape[-1], 5))
        return jnp.square(x @ kernel)


class Linear(nn.Module):
    """A linear module of somebody's own, which stores its kernel transposed."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(1.0), (5, x.shape[-1]))
        return x @ weight.T


class TwoHeads(nn.Module):
    def setup(self):
        self.used, self.unused = nn.Dense(3), nn.Dense(3)

    def __call__(self, x):
        return self.used(x)

    def both(self, x):
        return self.used(x) + self.unused(x)


def spec_of(model, x, rules, **settings):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return make_spec(model.apply, variables, rules, x, **settings)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (nn.Conv(5, (3,)), jnp.ones((2, 7, 4)), "is convolved in Conv"),
        (Quadratic(), jnp.ones((2, 4)), "the product goes through .* in Quadratic"),
    ],
)
def test_kernels_that_do_more_are_refused_by_name(model, x, words):
    with pytest.raises(InputError, match=f"kernel .*{words}.*library's einsum"):
        spec_of(model, x, [KERNEL])


def test_an_embedding_is_refused_by_name():
    rules = [Rule(pattern="embedding", rank=1, directions=1)]
    with pytest.raises(InputError, match=r"embedding is read by index in Embed"):
        spec_of(nn.Embed(5, 4), jnp.ones((2, 3), int), rules)


def test_a_bias_is_refused_for_what_it_is():
    rules = [Rule(pattern=".*", rank=1, directions=1)]
    with pytest.raises(InputError, match=r"bias is added.* in Dense"):
        spec_of(nn.Dense(5), jnp.ones((2, 3)), rules)


def test_matched_but_unused_kernels_are_refused():
    model, x = TwoHeads(), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x, method="both")
    with pytest.raises(InputError, match=r"unused/kernel is matched.*no module uses"):
        make_spec(model.apply, variables, [KERNEL], x)


def test_a_rule_that_matches_nothing_is_refused():
    rules = [Rule(pattern=".*/kernels")]
    with pytest.raises(InputError, match=r"matches no parameter.*body/mix/kernel"):
        spec_of(net("scan", "tsd")[0], inputs("scan"), rules)


def test_boxed_parameters_stay_in_their_boxes():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model, x = nn.Dense(5, kernel_init=init), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    spec = make_spec(model.apply, variables, [KERNEL], x)
    assert spec == make_spec(model.apply, nn.meta.unbox(variables), [KERNEL], x)
    pairs = random_all(0, spec)
    got, want, plain = three_ways(model, variables["params"], pairs, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(got - plain).max() > 0.1
    merged = merge(variables["params"], *pairs)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
    assert merged["kernel"].names == ("in", "out")


def test_a_rank_larger_than_the_kernel_is_refused():
    rules = [Rule(pattern=".*kernel", rank=5, directions=1)]
    with pytest.raises(InputError, match=r"rank 5 is larger.*\(in 4, out 9\)"):
        spec_of(nn.Dense(9), jnp.ones((2, 4)), rules)


def test_a_handler_of_your_own():
    def linear(module: nn.Module, x: jax.Array) -> Call:
        del module
        return Call("weight", x, "...i,oi->...o")

    handlers = {**HANDLERS, Linear: linear}
    model, x = Linear(), jax.random.normal(jax.random.key(1), (2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    rules = [Rule(pattern="weight", rank=2, directions=2)]
    spec = make_spec(model.apply, {"params": params}, rules, x, handlers=handlers)
    assert spec.kernels[0].layout == Layout((), (1,), (0,))
    pairs = random_all(0, spec)
    got, want, plain = three_ways(model, params, pairs, x, handlers)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, plain)


@pytest.mark.parametrize(
    ("name", "stored", "layout"),
    [
        # One matrix for each head, of an output axis and of an input axis.
        ("heads", (3, 6, 2, 4), Layout((0, 2), (1,), (3,))),
        ("join", (3, 2, 5, 6), Layout((0, 1), (2,), (3,))),
        # The same axes, flattened the other way.
        ("heads", (3, 6, 2, 4), Layout((0,), (1,), (3, 2))),
    ],
)
def test_a_rules_layout_comes_before_the_traced_one(name, stored, layout):
    model, params, _ = net("scan", "tsd")
    assert params["body"][name]["kernel"].shape == stored
    x, path = inputs("scan"), f"body/{name}/kernel"
    rules = [Rule(pattern=path, rank=2, directions=3, layout=layout)]
    method = method_of("tsd+keep")
    spec = make_spec(model.apply, {"params": params}, rules, x, method=method)
    assert spec.kernels[0].batch_shape == tuple(stored[axis] for axis in layout.batch)
    pairs = random_all(0, spec, scale=0.3)
    got, want, plain = three_ways(model, params, pairs, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(want - plain)).max() > 0.1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout((0,), (2, 3), (1,)), "contradicts the module"),
        (Layout((0,), (1, 2), (3,)), "contradicts the module"),
        (Layout((), (0, 1), (2, 3)), "contradicts the module"),
        (Layout((2,), (1,), (3,)), "does not lay out"),
    ],
)
def test_a_layout_that_contradicts_the_module_is_refused(layout, message):
    rules = [Rule(pattern="body/heads/kernel", rank=1, directions=1, layout=layout)]
    with pytest.raises(InputError, match=f"body/heads/kernel.*{message}"):
        spec_of(net("scan", "tsd")[0], inputs("scan"), rules)


def test_a_handler_that_fails_is_one_line():
    def wrong(module: nn.Module) -> Call:
        raise AssertionError(module)

    with pytest.raises(
        InputError, match=r"are watched \(TypeError: .*einsum$"
    ) as caught:
        spec_of(
            Linear(), jnp.ones((2, 4)), [KERNEL_OF_LINEAR], handlers={Linear: wrong}
        )
    assert "\n" not in str(caught.value)


def test_an_error_of_the_models_own_is_not_ours():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(3)(x)
            if not self.is_initializing():
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        spec_of(Failing(), jnp.ones((2, 4)), [KERNEL])
