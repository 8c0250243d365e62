from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.trees import filled
from tsd_jax.binding.calls import find_handler, method_name
from tsd_jax.binding.linen.handlers import HANDLERS, dense

MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dense": (nn.Dense(5), (2, 3, 4)),
    "dense, vector": (nn.Dense(5), (4,)),
    "general": (nn.DenseGeneral(5), (2, 3, 4)),
    "general, heads out": (nn.DenseGeneral((2, 5)), (2, 3, 4)),
    "general, heads in": (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4)),
    "general, axes reversed": (nn.DenseGeneral(5, axis=(-1, -2)), (2, 3, 3)),
    "general, other axis": (nn.DenseGeneral((5, 2), axis=1), (2, 3, 4)),
    "general, axes apart": (nn.DenseGeneral(5, axis=(3, 1)), (2, 3, 4, 3)),
    "general, stacked": (nn.DenseGeneral(5, batch_dims=(0,)), (2, 3, 4)),
    "general, two stacks": (
        nn.DenseGeneral((3, 2), axis=(-2, -1), batch_dims=(1, 0)),
        (2, 3, 2, 4, 5),
    ),
    "einsum": (nn.Einsum((4, 2, 5), "bti,iho->btho"), (2, 3, 4)),
    "einsum, ellipsis": (nn.Einsum((4, 5), "... i, io -> ... o"), (2, 3, 4)),
    "einsum, stacked": (nn.Einsum((3, 4, 5), "bhi,hio->bho"), (2, 3, 4)),
    "einsum, output first": (nn.Einsum((5, 4), "bti,oi->bot"), (2, 3, 4)),
}


@pytest.mark.parametrize(("module", "shape"), MODULES.values(), ids=MODULES)
def test_subscripts_are_what_the_module_computes(module, shape):
    module = module.clone(use_bias=False)  # pyright: ignore[reportCallIssue]
    x = filled(0, jax.ShapeDtypeStruct(shape, jnp.float32))
    variables = filled(1, jax.eval_shape(module.init, jax.random.key(1), x))
    y = jax.jit(module.apply)(variables, x)
    handler = find_handler(method_name(type(module).__call__), HANDLERS)
    assert handler is not None
    call = handler(module, x)
    kernel = variables["params"][call.kernel]
    labels = call.contraction
    subscripts = f"{labels.x},{labels.kernel}->{labels.y}"
    want = np.einsum(subscripts, np.asarray(call.x), np.asarray(kernel))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_einsum_takes_the_subscripts_of_the_call_first():
    module = nn.Einsum((4, 4), "bi,io->bo")
    call = HANDLERS[nn.Einsum](module, jnp.ones((2, 4)), einsum_str="bi,oi->bo")
    assert call.contraction.axes() == ((), (1,), (0,))


def test_a_handler_is_of_the_method_of_its_class():
    class Inherits(nn.Dense):
        pass

    class Overrides(nn.Dense):
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    def found(kind):
        return find_handler(method_name(kind.__call__), HANDLERS)

    assert found(Inherits) is found(nn.Dense) is dense
    assert found(Overrides) is found(nn.LayerNorm) is None
