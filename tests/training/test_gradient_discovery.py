from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.mlp import PATHS, TOKENS, Mlp, mlp_batch, mlp_params, mlp_spec
from tests.helpers.oracle import core_directions
from tsd_jax.binding.linen import adapted, bind_variables
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.training.gradient_discovery import KernelGradients, group
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import launch_state

LOSS = next_token_loss(adapted(Mlp().apply))
PARAMS = mlp_params()


@functools.cache
def started(method: str) -> tuple[Any, TrainState]:
    spec = mlp_spec(PARAMS, method)
    make = functools.partial(
        create_state, spec=spec, optimizer=make_optimizer(1e-3, 1e-3)
    )
    return spec, jax.jit(make)(jax.random.key(0))


def by_hand(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The dense gradients of the summed loss, in float64 NumPy."""
    up, down = (
        {name: np.asarray(x, np.float64) for name, x in PARAMS[layer].items()}
        for layer in ("up", "down")
    )
    embedding = np.asarray(PARAMS["embed"]["embedding"], np.float64)
    total = {"up/kernel": 0.0, "down/kernel": 0.0}
    for batch in batches:
        tokens, targets = batch["tokens"].ravel(), batch["targets"].ravel()
        assert tokens.max() < TOKENS
        x = embedding[tokens]
        h = np.tanh(x @ up["kernel"] + up["bias"])
        z = h @ down["kernel"] + down["bias"]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        p[np.arange(len(targets)), targets] -= 1
        dz = p * batch["weights"].ravel()[:, None]
        dh = (dz @ down["kernel"].T) * (1 - h**2)
        total["up/kernel"] = total["up/kernel"] + x.T @ dh
        total["down/kernel"] = total["down/kernel"] + h.T @ dz
    return {path: np.asarray(value) for path, value in total.items()}


@pytest.mark.parametrize("budget", [1, 2**20], ids=["one by one", "all at once"])
def test_gradients_are_of_the_adapted_kernels_over_all_batches(budget):
    spec, state = started("dash")
    batches = [mlp_batch(0), mlp_batch(1)]
    got = KernelGradients(
        LOSS, bind_variables, state, PARAMS, spec, batches, memory_budget=budget
    )
    assert set(got) == set(PATHS)
    assert len(got) == 2
    for path, want in by_hand(batches).items():
        np.testing.assert_allclose(got[path], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError):
        got["embed/embedding"]


@pytest.mark.parametrize("method", ["dash", "init", "tsd"])
def test_directions_at_step_0(method):
    """p_i = P_i^T (dL/dK) Q_i by definition, with A and B as they start."""
    spec, state = started(method)
    batches = [mlp_batch(0), mlp_batch(1)]
    changes = KernelGradients(LOSS, bind_variables, state, PARAMS, spec, batches)
    new, report = launch_state(state, PARAMS, spec, deltas=changes)
    for kernel in spec.kernels:
        module, name = kernel.path.split("/")
        want = core_directions(
            np.asarray(PARAMS[module][name]), by_hand(batches)[kernel.path]
        )
        known = want.sigma > 1e-4  # the tall kernel lacks its last two directions
        order = [i for i in want.order if known[i]][: kernel.ranked]
        np.testing.assert_array_equal(report[kernel.path].indices, order)
        rates = np.asarray(report[kernel.path].rates)[known]
        np.testing.assert_allclose(rates, want.rates[known], rtol=1e-3)
    assert new.launched


def test_kernels_are_grouped_by_memory():
    kernels = started("dash")[0].kernels
    sizes = {kernel.path: 4 * np.prod(kernel.shape) for kernel in kernels}
    first, second = (kernel.path for kernel in kernels)
    assert group(kernels, sum(sizes.values())) == [(first, second)]
    assert group(kernels, sum(sizes.values()) - 1) == [(first,), (second,)]
    assert group(kernels, 1) == [(first,), (second,)]


def test_gradients_lie_where_the_kernels_do():
    spec, state = started("dash")
    mesh = jax.make_mesh(
        (4,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )

    def place(keys: Any, leaf: jax.Array) -> NamedSharding:
        rows = ("x",) if keys[-1].key == "kernel" else ()
        return NamedSharding(mesh, PartitionSpec(*rows))

    places = jax.tree_util.tree_map_with_path(place, PARAMS)
    params = jax.device_put(PARAMS, places)
    whole = NamedSharding(mesh, PartitionSpec())
    batch = jax.device_put(mlp_batch(0), whole)
    got = KernelGradients(
        LOSS, bind_variables, jax.device_put(state, whole), params, spec, [batch]
    )
    for path, want in by_hand([mlp_batch(0)]).items():
        place_of: Any = got[path].sharding
        assert place_of.spec == PartitionSpec("x")
        np.testing.assert_allclose(got[path], want, rtol=1e-4, atol=1e-5)
