from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.mlp import CLASSES, RULES, Mlp, mlp_batch, mlp_params, mlp_spec
from tests.helpers.trees import random_all
from tsd_jax.binding.linen import adapted, bind_variables
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.training.optimizer import group_labels, make_optimizer
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import accumulate_gradients, launch_state, make_train_step

LOSS = next_token_loss(adapted(Mlp().apply))
PARAMS = mlp_params()
KEY = jax.random.key(0)


@functools.cache
def filled_state() -> TrainState:
    """Return a state in which every leaf of both trees counts."""
    trainable, directions = random_all(0, mlp_spec(PARAMS, "tsd+keep"), 0.3)
    step, launched = np.zeros((), np.int32), np.ones((), bool)
    return TrainState(step, launched, trainable, directions, opt_state=())


accumulate = jax.jit(functools.partial(accumulate_gradients, LOSS, bind_variables))


def whole_batch() -> dict[str, np.ndarray]:
    """Return 12 examples of very unequal numbers of counted targets, in one batch."""
    parts = [mlp_batch(0), mlp_batch(1)]
    batch = {
        name: np.concatenate([part[name].reshape(8, 6) for part in parts])[None, :12]
        for name in parts[0]
    }
    for example in range(12):
        batch["weights"][0, example, 1 + example // 2 :] = 0
    return batch


def split(batch: dict[str, np.ndarray], micro_batches: int) -> dict[str, np.ndarray]:
    return {
        name: array.reshape(micro_batches, -1, array.shape[-1])
        for name, array in batch.items()
    }


def distance(got: Any, want: Any) -> float:
    """Compare two trees by norm."""
    difference = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), got, want)
    norms = [
        np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (difference, want)
    ]
    return norms[0] / norms[1]


@pytest.mark.parametrize("micro_batches", [3, 12])
def test_unequal_micro_batches_give_the_gradient_of_the_whole(micro_batches):
    batch = whole_batch()
    want = accumulate(filled_state(), PARAMS, batch, None)
    got = accumulate(filled_state(), PARAMS, split(batch, micro_batches), None)
    assert distance(got[0], want[0]) < 1e-6
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    assert got[2] == want[2] == batch["weights"].sum()


def test_the_gradient_is_of_the_mean_over_counted_targets():
    """Against the merged model, differentiated through the merge."""
    batch, state = whole_batch(), filled_state()

    @jax.jit
    @jax.value_and_grad
    def mean(trainable):
        variables = {"params": merge(PARAMS, trainable, state.directions)}
        logits = Mlp().apply(variables, batch["tokens"][0])
        likelihood = jax.nn.log_softmax(jnp.asarray(logits))
        hot = jax.nn.one_hot(batch["targets"][0], CLASSES)
        each = jnp.sum(likelihood * hot, -1) * batch["weights"][0]
        return -jnp.sum(each) / batch["weights"].sum()

    loss, want = mean(state.trainable)
    grads, got, _ = accumulate(state, PARAMS, split(batch, 3), None)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    assert distance(grads, want) < 1e-5
    assert jax.tree.structure(grads) == jax.tree.structure(state.trainable)


def test_the_mean_of_means_would_be_another_gradient():
    """So that the tests above can fail."""
    batch, state = split(whole_batch(), 3), filled_state()
    want = accumulate(state, PARAMS, batch, None)[0]
    parts = [
        accumulate(state, PARAMS, {k: v[n : n + 1] for k, v in batch.items()}, None)[0]
        for n in range(3)
    ]
    naive = jax.tree.map(lambda *grads: sum(grads) / 3, *parts)
    assert distance(naive, want) > 0.05


def test_a_batch_that_counts_nothing_gives_zeros():
    batch = split(whole_batch(), 3)
    batch["weights"] = np.zeros_like(batch["weights"])
    grads, loss, count = accumulate(filled_state(), PARAMS, batch, None)
    assert loss == count == 0
    assert all((np.asarray(grad) == 0).all() for grad in jax.tree.leaves(grads))


def new_state(method: str, optimizer: Any) -> tuple[TrainState, Spec]:
    spec = mlp_spec(PARAMS, method)
    return create_state(KEY, spec, optimizer), spec


def test_one_trace_and_one_executable_serve_both_phases():
    made = make_optimizer(1e-2, 1e-2, clip_norm=1.0)
    chex.clear_trace_counter()
    update: Any = chex.assert_max_traces(made.update, n=1)
    optimizer = optax.GradientTransformation(made.init, update)
    state, spec = new_state("tsd", optimizer)
    step = make_train_step(LOSS, bind_variables, optimizer)
    for n in range(6):
        if n == 3:
            state, _ = launch_state(state, PARAMS, spec)
        state, metrics = step(state, PARAMS, mlp_batch(n), KEY)
        assert np.isfinite(metrics["loss"])
    assert step._cache_size() == 1
    assert (int(state.step), bool(state.launched)) == (6, True)


def test_the_state_is_donated_and_the_base_is_not():
    optimizer = make_optimizer(1e-2, 1e-2)
    state, _ = new_state("dash", optimizer)
    make_train_step(LOSS, bind_variables, optimizer)(state, PARAMS, mlp_batch(0), KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(PARAMS))


def test_metrics_are_of_the_batch_before_the_update():
    optimizer = make_optimizer(1e-2, 1e-2, clip_norm=1e-3)
    state, _ = new_state("dash", optimizer)
    batch = mlp_batch(0)
    grads, loss, count = accumulate(state.replace(opt_state=()), PARAMS, batch, None)
    _, metrics = make_train_step(LOSS, bind_variables, optimizer)(
        state, PARAMS, batch, KEY
    )
    assert set(metrics) == {"loss", "grad_norm", "targets"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 1e-2  # above the clipping
    assert metrics["targets"] == count


def with_dropout(spec: Spec) -> Spec:
    kernels = (KernelSpec(**{**vars(k), "dropout": 0.5}) for k in spec.kernels)
    return Spec(tuple(kernels), spec.method)


@functools.cache
def dropout_loss(dropout: bool):
    """Return the loss of one step, as a function of the key and of the state's step."""
    optimizer = make_optimizer(1e-2, 1e-2)
    spec = with_dropout(mlp_spec(PARAMS, "dash"))
    step = make_train_step(LOSS, bind_variables, optimizer, dropout=dropout)

    def loss(key: int, at: int = 0, micro_batches: int = 2) -> float:
        trainable, directions = random_all(0, spec, 0.3)
        opt_state = optimizer.init(trainable)  # pyright: ignore[reportArgumentType]
        state = create_state(KEY, spec, optimizer).replace(
            trainable=trainable,
            directions=directions,
            opt_state=opt_state,
            step=jnp.asarray(at, jnp.int32),
        )
        one = {name: array[:1] for name, array in mlp_batch(0).items()}
        batch = {k: np.repeat(v, micro_batches, axis=0) for k, v in one.items()}
        return float(step(state, PARAMS, batch, jax.random.key(key))[1]["loss"])

    return loss


def test_dropout_draws_by_key_and_step():
    loss = dropout_loss(True)
    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(0, at=1)}) == 3


def test_micro_batches_draw_apart():
    """Twice the same examples: the mean of two masks is not that of one."""
    loss = dropout_loss(True)
    assert abs(loss(0, micro_batches=2) - loss(0, micro_batches=1)) > 1e-3
    whole = dropout_loss(False)
    np.testing.assert_allclose(whole(0), whole(0, micro_batches=1), rtol=1e-6)


def test_without_dropout_the_key_does_not_matter():
    loss = dropout_loss(False)
    assert loss(0) == loss(1) == loss(0, at=1)


def test_a_second_launch_is_refused():
    state, spec = new_state("dash", make_optimizer(1e-2, 1e-2))
    launched = state.replace(launched=jnp.ones((), bool))
    with pytest.raises(InputError, match="launched already; a run launches once"):
        launch_state(launched, PARAMS, spec)


def test_a_launch_on_nothing_is_refused():
    state, spec = new_state("dash", make_optimizer(1e-2, 1e-2))
    with pytest.raises(InputError, match="B is zero, so there is no change to rank"):
        launch_state(state, PARAMS, spec)


def test_launch_takes_the_start_of_moments_from_the_optimizer():
    """Adagrad's accumulators start at 0.1."""
    groups: Any = {name: optax.adagrad(1e-2) for name in ("lora", "gain", "full")}
    optimizer = optax.partition(groups, group_labels)
    state, spec = new_state("tsd", optimizer)
    step = make_train_step(LOSS, bind_variables, optimizer)
    state, _ = step(state, PARAMS, mlp_batch(0), KEY)
    with pytest.raises(InputError, match="launch_state the optimizer"):
        launch_state(state, PARAMS, spec)
    launched, _ = launch_state(state, PARAMS, spec, optimizer=optimizer)
    for leaf in jax.tree.leaves(launched.opt_state):
        np.testing.assert_allclose(leaf, 0.1)


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("method", ["dash", "tsd"])
def test_launch_state(method):
    """What continues and what restarts; the moments by group."""
    optimizer = make_optimizer(1e-2, 1e-2)
    state, spec = new_state(method, optimizer)
    step = make_train_step(LOSS, bind_variables, optimizer)
    state, _ = step(state, PARAMS, mlp_batch(0), KEY)
    launched, report = launch_state(state, PARAMS, spec)
    assert set(report) == set(spec.paths) == {rule.pattern for rule in RULES}
    assert (int(launched.step), bool(launched.launched)) == (1, True)
    assert not state.launched

    def adam(state, group) -> Any:
        """Find the Adam of a group: gains are the only vectors."""
        nodes = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
        kinds = {"lora": 2, "gain": 1}
        (found,) = (
            node
            for node in nodes
            if is_adam(node)
            and {leaf.ndim for leaf in jax.tree.leaves(node.mu)} == {kinds[group]}
        )
        return found

    restarted = {"lora": get_method(method).restart, "gain": True}
    for group, again in restarted.items():
        before, after = adam(state, group), adam(launched, group)
        assert int(before.count) == 1
        assert int(after.count) == (0 if again else 1)
        if not again:
            chex.assert_trees_all_equal(before, after)
        else:
            assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(after))
