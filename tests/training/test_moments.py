from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.trees import method_of
from tests.training.test_optimizer import (
    AFTER,
    BEFORE,
    GAIN_RATE,
    RATE,
    before_launch,
    both,
    hugging_face,
    optimizer,
    run,
    tree,
)
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.training import moments
from tsd_jax.training.moments import reset_moments
from tsd_jax.training.optimizer import group_labels, make_optimizer, make_schedule


@pytest.mark.parametrize("method", ["dash", "tsd", "tsd+keep"])
def test_gains_start_as_a_fresh_adam_does(method):
    _, state = before_launch()
    updates, _ = run(optimizer()[1], reset_moments(state, method_of(method)), AFTER)
    want = -GAIN_RATE * np.sign(AFTER[0].adapters["k"].gain)
    for step in updates:
        np.testing.assert_allclose(step["gain"], want, rtol=1e-4)


def test_without_the_reset_the_gains_would_overshoot():
    """What it is for: counts that ran on make of 100 zeros a small second moment."""
    _, state = before_launch()
    updates, _ = run(optimizer()[1], state, AFTER)
    peak = max(np.abs(step["gain"]).max() for step in updates)
    assert peak > 2 * GAIN_RATE


def test_dash_goes_on_with_the_moments_of_a_and_b():
    """To the bit: as if there had been no launch."""
    _, state = before_launch()
    update = optimizer()[1]
    launched, _ = run(update, reset_moments(state, get_method("dash")), AFTER[:3])
    unbroken, _ = run(update, state, AFTER[:3])
    for ours, theirs in zip(launched, unbroken, strict=True):
        np.testing.assert_array_equal(ours["a"], theirs["a"])
        np.testing.assert_array_equal(ours["b"], theirs["b"])


@pytest.mark.parametrize("method", ["init", "tsd", "init+keep", "tsd+keep"])
def test_restarting_methods_forget_the_moments_of_a_and_b(method):
    _, state = before_launch()
    updates, _ = run(optimizer()[1], reset_moments(state, method_of(method)), AFTER[:3])
    for step in updates:
        for field in ("a", "b"):
            want = -RATE * np.sign(getattr(AFTER[0].adapters["k"], field))
            np.testing.assert_allclose(step[field], want, rtol=1e-4)


def test_schedules_read_on_over_the_launch():
    """No second warm-up: the rate is that of the global step in both groups."""
    rate = make_schedule(RATE, steps=200, warmup=20)
    gain_rate = make_schedule(GAIN_RATE, steps=200, warmup=20)
    made, update = optimizer(rate=rate, gain_rate=gain_rate)
    _, state = run(update, made.init(tree(None)), BEFORE)
    updates, _ = run(update, reset_moments(state, get_method("tsd")), AFTER)
    for step, moved in enumerate(updates, start=100):
        share = hugging_face("linear", step, 20, 200)
        for field, peak in (("a", RATE), ("b", RATE), ("gain", GAIN_RATE)):
            want = -share * peak * np.sign(getattr(AFTER[0].adapters["k"], field))
            np.testing.assert_allclose(moved[field], want, rtol=1e-4)


def adamw_chain(names: tuple[str, str]) -> Any:
    """Write an optimizer of somebody's own: other names, adamw with a schedule."""
    lora, gain = names
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    labels = {"lora": lora, "gain": gain}

    def label(trainable):
        return jax.tree.map(labels.__getitem__, group_labels(trainable))

    return optax.chain(
        optax.zero_nans(),
        optax.partition({lora: optax.adamw(schedule), gain: optax.adam(0.1)}, label),
    )


@pytest.mark.parametrize("wrap", [lambda made: made, optax.apply_if_finite])
def test_a_chain_of_your_own(wrap):
    """Only Adam starts again; the schedule inside adamw keeps its count."""
    made = adamw_chain(("factors", "coordinates"))
    if wrap is optax.apply_if_finite:
        made = optax.apply_if_finite(made, 3)
    update = jax.jit(made.update)
    labels = {"lora": "factors", "gain": "coordinates"}
    _, state = run(update, made.init(tree(None)), BEFORE[:4])
    state = reset_moments(state, get_method("tsd"), labels)
    (step,), _ = run(update, state, AFTER[:1])
    sign = {f: np.sign(getattr(AFTER[0].adapters["k"], f)) for f in ("a", "gain")}
    np.testing.assert_allclose(step["a"], -0.4 * sign["a"], rtol=1e-3)
    np.testing.assert_allclose(step["gain"], -0.1 * sign["gain"], rtol=1e-4)


def test_a_state_without_the_groups_is_refused():
    plain = optax.adam(1e-3).init(tree(None))
    with pytest.raises(InputError, match=r"no optax.partition.*\['gain', 'lora'\]"):
        reset_moments(plain, get_method("tsd"))
    other = adamw_chain(("factors", "coordinates")).init(tree(None))
    with pytest.raises(InputError, match=r"groups \['gain'\].*group_labels"):
        reset_moments(other, get_method("dash"))


def test_shapes_and_types_stay():
    _, state = before_launch()
    new = reset_moments(state, get_method("tsd"))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("method", ["dash", "init", "tsd"])
def test_launch_never_resets_full_parameters(method):
    made = make_optimizer(RATE, GAIN_RATE)
    _, state = made.update(both(1), made.init(both(0)), both(0))
    again = reset_moments(state, get_method(method))

    def moments(state: Any) -> Any:
        return state[1].inner_states["full"]

    for kept, before in zip(
        jax.tree.leaves(moments(again)), jax.tree.leaves(moments(state)), strict=True
    ):
        assert np.any(before != 0)
        np.testing.assert_array_equal(kept, before)


def test_a_partition_of_two_groups_serves_where_there_are_no_full_parameters():
    groups: dict[Any, Any] = {"lora": optax.adam(RATE), "gain": optax.adam(GAIN_RATE)}
    made = optax.partition(groups, group_labels)
    state = reset_moments(made.init(tree(0)), get_method("tsd"))
    updates, _ = made.update(tree(1), state, tree(0))
    assert jax.tree.structure(updates) == jax.tree.structure(tree(0))
    with pytest.raises(ValueError, match="full"):
        made.init(both(0))


def is_optax(kind: Any, name: str) -> bool:
    return kind.__name__ == name and kind.__module__.startswith("optax.")


def test_every_name_in_the_tables_is_a_state_of_optax():
    tables = (
        *moments.WRAPPERS,
        *moments.CLOCKS,
        *moments.ZERO_MOMENTS,
        *moments.SET_MOMENTS,
    )
    assert len(set(tables)) == len(tables)
    for name in tables:
        kind: Any
        (kind,) = (kind for kind in tuple.__subclasses__() if is_optax(kind, name))
        fields = (moments.WRAPPERS.get(name), *moments.CONSTANTS.get(name, ()))
        assert set(fields) - {None} <= set(kind._fields)


SCHEDULE = optax.linear_schedule(0.1, 0.05, 12)


def inner(make: Any, **settings: Any) -> Any:
    """Return a maker of an optimizer that follows the schedule."""
    return lambda: make(SCHEDULE, **settings)


ZEROS = {
    "sgd": inner(optax.sgd, momentum=0.9),
    "nesterov": inner(optax.sgd, momentum=0.9, nesterov=True),
    "adam": inner(optax.adam),
    "adamw": inner(optax.adamw),
    "nadam": inner(optax.nadam),
    "adamax": inner(optax.adamax),
    "radam": inner(optax.radam),
    "amsgrad": inner(optax.amsgrad),
    "lion": inner(optax.lion),
    "adabelief": inner(optax.adabelief),
    "adadelta": inner(optax.adadelta),
    "adan": inner(optax.adan),
    "adafactor": inner(optax.adafactor, min_dim_size_to_factor=2, momentum=0.9),
    "lamb": inner(optax.lamb),
    "lars": inner(optax.lars),
    "novograd": inner(optax.novograd),
    "signum": inner(optax.signum),
    "sm3": lambda: optax.sm3(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "muon": inner(optax.contrib.muon),
    "ademamix": inner(optax.contrib.ademamix),
    "simplified ademamix": inner(optax.contrib.simplified_ademamix),
    "adopt": inner(optax.contrib.adopt),
    "acprop": inner(optax.contrib.acprop),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale_by_schedule(SCHEDULE)),
    "masked": lambda: optax.masked(optax.adam(SCHEDULE), tree_of),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(SCHEDULE), 3),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "named": lambda: optax.named_chain(("one", optax.adam(SCHEDULE))),
}
SET = {
    "rmsprop": inner(optax.rmsprop, initial_scale=1.0),
    "rmsprop centered": inner(optax.rmsprop, centered=True, momentum=0.9),
    "rmsprop corrected": inner(optax.rmsprop, bias_correction=True),
    "rmsprop both": inner(optax.rmsprop, centered=True, bias_correction=True),
    "adagrad": inner(optax.adagrad),
    "rprop": lambda: optax.rprop(0.1),
    "yogi": inner(optax.yogi),
    "optimistic": inner(optax.optimistic_adam_v2),
}
UNTIL, BEYOND = 4, 3


def tree_of(tree: Any) -> Any:
    """Return True in place of every leaf."""
    return jax.tree.map(lambda _: True, tree)


def gradients(first: int, count: int) -> list[Any]:
    return [both(first + n) for n in range(count)]


def steps(update: Any, state: Any, grads: list[Any]) -> tuple[list[Any], Any]:
    """Return the updates of each step and the last state."""
    found = []
    for each in grads:
        updates, state = update(each, state, both(77))
        found.append(jax.tree.map(np.asarray, updates))
    return found, state


def at_step(state: Any, count: int) -> Any:
    """Set the counts of all schedules, as if so many steps had been taken."""
    kinds = ("ScaleByScheduleState", "InjectStatefulHyperparamsState")

    def is_clock(node: Any) -> bool:
        return type(node).__name__ in kinds

    def move(node: Any) -> Any:
        if not is_clock(node):
            return node
        if "inner_state" in node._fields:
            states = jax.tree.map(lambda x: jnp.full_like(x, count), node[2])
            node = node._replace(hyperparams_states=states)
        return node._replace(count=jnp.full_like(node.count, count))

    return jax.tree.map(move, state, is_leaf=is_clock)


def restarted_fields(method: str) -> dict[str, bool]:
    found = get_method(method)
    return {"a": found.restart, "b": found.restart, "gain": found.gains}


def assert_restarted(method: str, got: Any, fresh: Any, unbroken: Any) -> None:
    """Compare each leaf with the optimizer that it should follow."""
    for ours, new, old in zip(got, fresh, unbroken, strict=True):
        for field, again in restarted_fields(method).items():
            want = (new if again else old).adapters["k"]
            np.testing.assert_allclose(
                getattr(ours.adapters["k"], field), getattr(want, field), rtol=1e-6
            )
        np.testing.assert_array_equal(ours.full["norm"].value, old.full["norm"].value)


@pytest.mark.parametrize("name", [*ZEROS, *SET])
def test_updates_after_a_reset_are_those_of_a_fresh_optimizer(name):
    """Fresh but for the counts of its schedules; other groups continue."""
    make = {**ZEROS, **SET}[name]
    groups: Any = {name: make() for name in ("lora", "gain", "full")}
    made = optax.partition(groups, group_labels)
    update = jax.jit(made.update)
    start: Any = made.init(both(77))
    _, state = steps(update, start, gradients(0, UNTIL))
    beyond = gradients(50, BEYOND)
    fresh, _ = steps(update, at_step(start, UNTIL), beyond)
    unbroken, _ = steps(update, state, beyond)
    for method in ("dash", "init", "tsd"):
        initial = start if name in SET else None
        reset = reset_moments(state, get_method(method), initial=initial)
        got, _ = steps(update, reset, beyond)
        assert_restarted(method, got, fresh, unbroken)


@pytest.mark.parametrize("name", sorted(set(SET) - {"yogi"}))
def test_moments_that_start_elsewhere_ask_for_their_start(name):
    groups: Any = {"lora": SET[name](), "gain": optax.sgd(0.1)}
    state = optax.partition(groups, group_labels).init(tree(0))
    with pytest.raises(InputError, match=r"does not start at zero.*initial=optimizer"):
        reset_moments(state, get_method("tsd"))


UNKNOWN = {
    "ScaleByLBFGSState": lambda: optax.scale_by_lbfgs(),
    "ScaleByDistanceOverGradientsState": lambda: (
        optax.scale_by_distance_over_gradients()
    ),
    "ProdigyState": lambda: optax.contrib.prodigy(),
    "ScheduleFreeState": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "ArrayImpl": lambda: optax.GradientTransformation(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None: (updates, state),
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_states_are_refused_by_name(name):
    groups: Any = {"lora": UNKNOWN[name](), "gain": optax.adam(0.1)}
    state = optax.partition(groups, group_labels).init(tree(0))
    with pytest.raises(InputError, match=rf"reset the optimizer state {name} of"):
        reset_moments(state, get_method("tsd"))
    reset_moments(state, get_method("dash"))  # which leaves that group alone


def groups_of(make: Any) -> Any:
    made: Any = {name: make() for name in ("lora", "gain", "full")}
    return optax.partition(made, group_labels)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("taken", [4, 5])
def test_an_accumulation_starts_again(outside, taken):
    """Whole or under way: no gradient from before launch reaches what is new."""

    def every_two(made: Any) -> Any:
        return optax.MultiSteps(made, 2).gradient_transformation()

    if outside:
        made = every_two(groups_of(lambda: optax.adam(SCHEDULE)))
    else:
        made = groups_of(lambda: every_two(optax.adam(SCHEDULE)))
    update = jax.jit(made.update)
    start: Any = made.init(both(77))
    _, state = steps(update, start, gradients(0, taken))
    reset: Any = reset_moments(state, get_method("tsd"))
    beyond = gradients(50, 4)
    got, _ = steps(update, reset, beyond)
    fresh, _ = steps(update, at_step(start, 2), beyond)
    for ours, new in zip(got, fresh, strict=True):
        for field in ("a", "b", "gain"):
            pair = (getattr(each.adapters["k"], field) for each in (ours, new))
            np.testing.assert_allclose(*pair, rtol=1e-6)


@pytest.mark.parametrize("method", ["dash", "tsd"])
def test_moments_outside_of_the_partition_restart_leaf_by_leaf(method):
    made = optax.chain(optax.trace(0.9), groups_of(lambda: optax.sgd(0.1)))
    start: Any = made.init(both(77))
    _, state = steps(made.update, start, gradients(0, UNTIL))
    beyond = gradients(50, BEYOND)
    for initial in (None, start):
        reset = reset_moments(state, get_method(method), initial=initial)
        got, _ = steps(made.update, reset, beyond)
        fresh, _ = steps(made.update, start, beyond)
        unbroken, _ = steps(made.update, state, beyond)
        assert_restarted(method, got, fresh, unbroken)


def test_a_count_of_all_groups_is_refused():
    made = optax.chain(optax.scale_by_adam(), groups_of(lambda: optax.sgd(0.1)))
    with pytest.raises(InputError, match="move that transform into each group"):
        reset_moments(made.init(both(0)), get_method("dash"))


def test_other_parameters_beside_what_trains_continue():
    """A head of one's own, with Adam in a partition around ours."""
    ours: Any = {"lora": optax.adam(0.1), "gain": optax.adam(0.1)}
    around: Any = {
        "adapters": optax.partition(ours, lambda all: label_all(all)),
        "head": optax.adam(0.1),
    }

    def label_all(all: Any) -> Any:
        return {**all, "trainable": group_labels(all["trainable"])}

    labels = {"trainable": "adapters", "head": "head"}
    made = optax.partition(around, labels)
    params: Any = {"trainable": tree(0), "head": jnp.ones(3)}
    _, state = made.update(params, made.init(params), params)
    reset: Any = reset_moments(state, get_method("tsd"))
    leaves = jax.tree.leaves(reset.inner_states["adapters"])
    assert all((np.asarray(leaf) == 0).all() for leaf in leaves)
    kept = jax.tree.leaves(reset.inner_states["head"])
    assert all((np.asarray(leaf) != 0).all() for leaf in kept)


def test_a_start_of_another_optimizer_is_refused():
    state = make_optimizer(RATE, GAIN_RATE).init(both(0))
    other = make_optimizer(RATE, GAIN_RATE, clip_norm=1.0).init(tree(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="not a state of the same optimizer"):
        reset_moments(state, get_method("tsd"), initial=other)


@pytest.mark.parametrize("given", [True, False])
def test_types_and_shardings_stay(given):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    at = NamedSharding(mesh, PartitionSpec())
    trainable: Any = Trainable(adapters=jax.device_put(tree(0).adapters, at))
    half: Any = {
        name: optax.adam(0.1, mu_dtype=jnp.bfloat16) for name in ("lora", "gain")
    }
    made = optax.partition(half, group_labels)
    state = jax.device_put(made.init(trainable), at)
    initial = made.init(tree(0)) if given else None
    reset = reset_moments(state, get_method("tsd"), initial=initial)
    for ours, theirs in zip(
        jax.tree.leaves(reset), jax.tree.leaves(state), strict=True
    ):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, theirs.sharding)


def test_it_may_be_traced():
    made = make_optimizer(RATE, GAIN_RATE)
    _, state = made.update(both(1), made.init(both(0)), both(0))
    method = get_method("tsd")
    want = reset_moments(state, method)
    got = jax.jit(lambda state, start: reset_moments(state, method, initial=start))(
        state, made.init(both(0))
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)
