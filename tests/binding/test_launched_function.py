"""What launch does to the function a model computes, before and after."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import Net, inputs, net
from tests.helpers.oracle import geometric, spectrum_kernel
from tests.helpers.trees import method_of, trained, zeros
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Trainable, merge
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch

METHODS = ["dash", "init", "tsd", "init+keep", "tsd+keep"]
LIFT = "scan of remat"
KERNELS = r"body/(heads|mix)/kernel"
apply = jax.jit(adapted(Net(LIFT).apply))
apply_bfloat16 = jax.jit(adapted(Net(LIFT, jnp.bfloat16).apply))


def trees(method, dtype):
    """Return what the model is called with: pretrained, trained, and launched.

    All of one shape, for one executable: the pretrained one has adapters without
    effect. The last is launched too, with a residual weight in place of the offset.
    """
    _, params, spec = net(LIFT, method_of(method), pattern=KERNELS, dtype=dtype)
    assert len(spec.kernels) == 2
    trainable, directions = trained(0, spec, 0.3)
    new, frozen, _ = launch(params, trainable, spec)
    residual = merge(params, zeros(new), frozen)  # K + L diag(o) R^T, in K's type
    without = {path: x.replace(offset=zeros(x.offset)) for path, x in frozen.items()}
    return (
        bind(params, zeros(trainable), directions),
        bind(params, trainable, directions),
        bind(params, new, frozen),
        bind(residual, new, without),
    )


def outputs(method, dtype):
    run = apply if dtype == jnp.float32 else apply_bfloat16
    x = inputs(LIFT, dtype)
    for tree in trees(method, dtype):
        yield np.asarray(run({"params": tree}, x), np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_in_float32(method):
    pretrained, before, after, _ = outputs(method, jnp.float32)
    assert np.abs(before - pretrained).max() > 0.1
    if method == "dash":
        np.testing.assert_array_equal(after, before)
        return
    want = before if method.endswith("+keep") else pretrained
    np.testing.assert_allclose(after, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dash", "tsd", "tsd+keep"])
def test_in_bfloat16(method):
    """The offset cancels in float32; a residual weight is rounded with the base."""
    pretrained, before, after, residual = outputs(method, jnp.bfloat16)
    assert np.abs(before - pretrained).max() > 0.1
    want = pretrained if method == "tsd" else before

    def error(y):
        return np.linalg.norm(y - want) / np.linalg.norm(want)

    assert error(after) < 1e-3
    if method != "dash":  # which takes nothing off the kernel
        assert error(residual) > 2e-3


SIZE, TAKEN = 64, 8


@pytest.fixture(scope="module")
def bfloat16_layer():
    """A wide falling spectrum in bfloat16, launched with tsd; float32 arithmetic."""
    model = nn.Dense(SIZE, use_bias=False)
    kernel, _, _ = spectrum_kernel(0, (SIZE, SIZE), geometric(SIZE))
    params = {"kernel": jnp.asarray(kernel, jnp.bfloat16)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, SIZE)), jnp.float32)
    rules = [Rule(pattern="kernel", rank=TAKEN, directions=TAKEN)]
    spec = make_spec(model.apply, {"params": params}, rules, x, method="tsd")
    trainable, frozen, _ = launch(params, trained(0, spec)[0], spec)
    return params["kernel"], trainable.adapters["kernel"], frozen["kernel"], x


def error_over_taken(bfloat16_layer, y):
    """Compare with the pretrained output; in units of what the adapter took over."""
    kernel, adapter, _, x = bfloat16_layer
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    taken = adapter.kernel.scale * np.asarray(adapter.a, np.float64) @ adapter.b
    return np.linalg.norm(y - x @ kernel) / np.linalg.norm(x @ taken)


def test_an_offset_beside_a_bfloat16_kernel_is_exact(bfloat16_layer):
    kernel, adapter, frozen, x = bfloat16_layer
    bound = bind(
        {"kernel": kernel}, Trainable(adapters={"kernel": adapter}), {"kernel": frozen}
    )
    model = nn.Dense(SIZE, use_bias=False)
    y = adapted(model.apply)({"params": bound}, x)
    assert error_over_taken(bfloat16_layer, np.asarray(y, np.float64)) < 1e-3


def test_a_residual_weight_in_bfloat16_is_not(bfloat16_layer):
    """The paper's W_res = W - sum sigma u v^T, float64 but for its rounding once."""
    kernel, adapter, frozen, x = bfloat16_layer
    left, right, offset = (np.asarray(x, np.float64) for x in jax.tree.leaves(frozen))
    residual = np.asarray(kernel, np.float64) + (left * offset) @ right.T
    rounded = np.asarray(jnp.asarray(residual).astype(jnp.bfloat16), np.float64)
    low_rank = adapter.kernel.scale * np.asarray(adapter.a, np.float64) @ adapter.b
    x64 = np.asarray(x, np.float64)
    exact = error_over_taken(bfloat16_layer, x64 @ (residual + low_rank))
    assert exact < 1e-3  # only the rounding is to blame
    assert error_over_taken(bfloat16_layer, x64 @ (rounded + low_rank)) > 0.3
