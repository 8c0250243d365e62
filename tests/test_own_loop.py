"""Adapters in a loop of somebody's own: their model, TrainState and optax chain.

Everything is done through the public names; no trainer of the library's is used.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import tsd_jax as tsd

WIDTH, HEADS, LAYERS, CLASSES = 8, 2, 2, 5
STEPS, LAUNCH = 30, 10


class Block(nn.Module):
    """Self-attention written with DenseGeneral, in the form a scan wants."""

    @nn.compact
    def __call__(self, x, _):
        def project(name):
            return nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(x)

        mixed = jax.nn.dot_product_attention(*map(project, ("query", "key", "value")))
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(mixed)
        return x + nn.Dense(WIDTH, name="mlp")(jnp.tanh(nn.LayerNorm()(x))), None


class Classifier(nn.Module):
    """Own model: a scanned stack of blocks before a head."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = stack(name="blocks")(x, None)
        return nn.Dense(CLASSES, name="head")(x.mean(1))


RULES = [
    tsd.Rule(pattern=r"blocks/value/kernel", rank=3, directions=4),
    tsd.Rule(pattern=r"blocks/(out|mlp)/kernel", rank=2, alpha=4, directions=4),
]


def own_optimizer() -> optax.GradientTransformation:
    """Clip, then AdamW on A and B and Adam on the gains; one schedule for both."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.02, 3, STEPS)
    groups: Any = {
        "lora": optax.adamw(schedule, weight_decay=0.01),
        "gain": optax.adam(schedule),
    }
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.partition(groups, tsd.group_labels)
    )


def train_step(state: TrainState, params: Any, directions: Any, batch: Any):
    """Take one step; the adapters are the state's parameters."""
    x, labels = batch

    def loss_fn(trainable):
        bound = tsd.bind(params, trainable, directions)
        logits = state.apply_fn({"params": bound}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def make_batch(rng: np.random.Generator):
    x = rng.normal(size=(32, 4, WIDTH)).astype(np.float32)
    return x, (np.abs(x[:, 0, 0]) * 2).astype(np.int32) % CLASSES


@pytest.fixture(scope="module")
def pretrained():
    model = Classifier()
    x, _ = make_batch(np.random.default_rng(0))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    return model, jax.jit(model.apply), params, x


@pytest.mark.parametrize("method", ["dash", "tsd"])
def test_a_loop_of_ones_own(pretrained, method):
    model, plain, params, x = pretrained
    spec = tsd.make_spec(model.apply, {"params": params}, RULES, x, method=method)
    assert len(spec.kernels) == 3

    trainable, directions = jax.jit(lambda key: tsd.init(key, spec))(jax.random.key(1))
    apply: Any = tsd.adapted(model.apply)
    predict = jax.jit(lambda a, d: apply({"params": tsd.bind(params, a, d)}, x))
    before = plain({"params": params}, x)
    np.testing.assert_array_equal(predict(trainable, directions), before)

    state: Any
    state = TrainState.create(apply_fn=apply, params=trainable, tx=own_optimizer())
    step_fn: Any = jax.jit(train_step)
    rng, losses, rankings, executables = np.random.default_rng(1), [], {}, 0
    for step in range(STEPS):
        if step == LAUNCH:
            executables = step_fn._cache_size()
            kept = predict(state.params, directions)
            trainable, directions, rankings = tsd.launch(params, state.params, spec)
            opt_state = tsd.reset_moments(state.opt_state, spec.method)
            state = state.replace(params=trainable, opt_state=opt_state)
            after = predict(trainable, directions)
            want = kept if method == "dash" else before
            np.testing.assert_allclose(
                after, want, atol=0 if method == "dash" else 1e-5
            )
        state, loss = step_fn(state, params, directions, make_batch(rng))
        losses.append(float(loss))

    assert step_fn._cache_size() == executables  # launch compiles no other step
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    gains = [np.abs(adapter.gain).min() for adapter in state.params.adapters.values()]
    assert min(gains) > 0
    assert set(rankings) == set(spec.paths)

    merged = tsd.merge(params, state.params, directions)
    np.testing.assert_allclose(
        plain({"params": merged}, x),
        predict(state.params, directions),
        atol=1e-4,
    )
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_the_adapter_can_be_exported(pretrained, tmp_path):
    model, _, params, x = pretrained
    rules = [tsd.Rule(pattern=r"blocks/mlp/kernel", rank=2, directions=3)]
    spec = tsd.make_spec(model.apply, {"params": params}, rules, x, method="dash")
    trainable, directions = tsd.init(jax.random.key(1), spec)

    def torch_name(path: str, layer: int | None) -> str:
        return f"layers.{layer}." + path.split("/")[1]

    export = tsd.to_peft(tmp_path, trainable, directions, torch_name, base_model="mine")
    assert export.rank == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
