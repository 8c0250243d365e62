from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tests.helpers.trees import small_spec, trained
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import Rule, Spec, build_spec
from tsd_jax.training import auto_launch
from tsd_jax.training.auto_launch import (
    AutoLaunchConfig,
    DirectionMonitor,
    MonitorState,
    advance,
    init_monitor,
    mean_overlap,
    sample,
)

CONFIG = AutoLaunchConfig(launch_min=2, launch_max=40, every=2, patience=2)


def stacks_of(kernels: int, layers: int) -> Spec:
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    names = [f"k{n}" for n in range(kernels)]
    return build_spec(
        dict.fromkeys(names, (layers, 6, 9)),
        dict.fromkeys(names, layout),
        dict.fromkeys(names, Rule(pattern=".*", rank=2, directions=3)),
        small_spec("dash").method,
    )


@pytest.mark.parametrize(
    ("kernels", "layers", "count"), [(7, 32, 16), (7, 32, 7), (4, 8, 4), (2, 9, 6)]
)
def test_the_sample_is_spread_over_kernels_and_layers(kernels, layers, count):
    chosen = sample(stacks_of(kernels, layers), count)
    assert [kernel.path for kernel, _ in chosen] == [f"k{n}" for n in range(kernels)]
    indices = [index for _, some in chosen for index in some]
    assert len(indices) == count
    assert len(set(indices)) >= min(count, layers) - 2
    assert (min(indices), max(indices)) == (0, layers - 1)


def test_a_small_model_is_watched_whole():
    chosen = sample(stacks_of(2, 3), 16)
    assert [indices for _, indices in chosen] == [(0, 1, 2), (0, 1, 2)]


def test_overlap_is_of_sets():
    old = {"k": np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), "j": np.array([[0, 1]])}
    new = {"k": np.array([[3, 2, 1, 0], [4, 8, 9, 7]]), "j": np.array([[2, 3]])}
    assert mean_overlap(old, new) == pytest.approx((1 + 0.5 + 0) / 3)


def state(streak: int = 0, checks: int = 0) -> MonitorState:
    return MonitorState(
        {"k": jnp.array([[0, 1, 2, 3]])},
        jnp.float32(0),
        jnp.int32(streak),
        jnp.int32(checks),
    )


def test_a_streak_counts_checks_on_end():
    same, half = {"k": np.array([[3, 0, 1, 2]])}, {"k": np.array([[0, 1, 8, 9]])}
    assert advance(state(1, 2), same, 1.0).streak == 2
    assert advance(state(1, 2), half, 0.5).streak == 2
    broken = advance(state(1, 2), half, 0.51)
    assert (broken.streak, broken.checks, broken.overlap) == (0, 3, 0.5)
    np.testing.assert_array_equal(broken.sets["k"], half["k"])
    assert advance(state(0, 0), same, 0.1).streak == 0, "nothing to compare with"


@pytest.mark.parametrize(
    ("step", "streak", "launches"),
    [(1, 2, False), (2, 1, False), (2, 2, True), (39, 0, False), (40, 0, True)],
)
def test_when_to_launch(step, streak, launches):
    assert CONFIG.launches(step, streak) is launches


def problem(shape: tuple[int, int], dora: bool = False) -> tuple[Spec, Any]:
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    spec = small_spec("dash", shape=(3, *shape), layout=layout, dora=dora)
    kernels = [spectrum_kernel(n, shape, geometric(min(shape)))[0] for n in range(3)]
    return spec, {"k": np.asarray(kernels, np.float32)}


def wanted(spec: Spec, params: Any, trainable: Any) -> np.ndarray:
    """The top sets of all layers, by full SVD."""
    kernel, adapter = params["k"], trainable.adapters["k"]
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    change = spec.kernels[0].scale * a @ b
    if adapter.magnitude is not None:
        norms = np.linalg.norm(kernel + change, axis=-2)
        scale = (np.asarray(adapter.magnitude) / norms)[:, None, :]
        change = scale * (kernel + change) - kernel
    tops = [
        core_directions(*pair).order[:4] for pair in zip(kernel, change, strict=True)
    ]
    return np.sort(tops, -1)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("spread", [False, True], ids=["one device", "sharded"])
def test_a_check_finds_the_sets_of_the_full_svd(shape, spread):
    """Two checks: each set as defined, and their overlap."""
    spec, params = problem(shape)
    first, second = trained(0, spec)[0], trained(5, spec)[0]
    monitor_state = init_monitor(spec, CONFIG)
    placed: Any = {name: jnp.asarray(x) for name, x in params.items()}
    if spread:
        mesh = jax.make_mesh(
            (3, 2),
            ("x", "y"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=jax.devices()[:6],
        )
        at = NamedSharding(mesh, PartitionSpec(None, "x"))
        placed = jax.device_put(placed, at)
        whole = NamedSharding(mesh, PartitionSpec())
        first, second, monitor_state = jax.device_put(
            (first, second, monitor_state), whole
        )
    monitor = DirectionMonitor(placed, spec, CONFIG)
    one = monitor(monitor_state, first)
    two = monitor(one, second)
    tops = [wanted(spec, params, trainable) for trainable in (first, second)]
    for got, top in zip((one, two), tops, strict=True):
        np.testing.assert_array_equal(np.sort(got.sets["k"], -1), top)
    shares = [len(set(x) & set(y)) / 4 for x, y in zip(*tops, strict=True)]
    np.testing.assert_allclose(two.overlap, np.mean(shares), rtol=1e-6)
    assert (int(one.checks), int(two.checks)) == (1, 2)
    for old, new in zip(
        jax.tree.leaves(monitor_state), jax.tree.leaves(two), strict=True
    ):
        assert (old.shape, old.dtype, old.sharding) == (
            *(new.shape, new.dtype, new.sharding),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launch_min": 41}, "launch_min 41 is larger than auto_launch.launch_max 40"),
        ({"launch_min": 0}, "launch_min must be a whole number of at least 1, not 0"),
        ({"threshold": 0.0}, r"threshold must be a number in \(0, 1\], not 0.0"),
        ({"threshold": 1.1}, r"threshold must be a number in \(0, 1\], not 1.1"),
        ({"every": 0}, "every must be a whole number of at least 1"),
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"matrices": 0}, "matrices must be a whole number of at least 1"),
        ({"every": 14}, "patience 2 and every 14 need 42 steps"),
    ],
)
def test_what_could_never_be_decided(settings, message):
    base = {"launch_min": 2, "launch_max": 40, "every": 2, "patience": 2}
    with pytest.raises(InputError, match=message):
        AutoLaunchConfig(**{**base, **settings})


def test_magnitudes_count_in_what_has_settled():
    spec, params = problem((6, 9), dora=True)
    trainable = trained(0, spec)[0]
    magnitude = np.random.default_rng(1).uniform(1, 9, size=(3, 9))
    moved = trainable.adapters["k"].replace(
        magnitude=jnp.asarray(magnitude, jnp.float32)
    )
    placed = {"k": jnp.asarray(params["k"])}
    seen = DirectionMonitor(placed, spec, CONFIG)(
        init_monitor(spec, CONFIG), Trainable(adapters={"k": moved})
    )
    want = wanted(spec, params, Trainable(adapters={"k": moved}))
    np.testing.assert_array_equal(np.sort(seen.sets["k"], -1), want)
    plain = wanted(
        spec, params, Trainable(adapters={"k": moved.replace(magnitude=None)})
    )
    assert (want != plain).any()


def test_devices_without_float64_are_watched_from_the_host(monkeypatch):
    spec, params = problem((6, 9))
    trainable = trained(0, spec)[0]
    monkeypatch.setattr(auto_launch, "has_float64", lambda platform: False)
    monitor_state = init_monitor(spec, CONFIG)
    seen = DirectionMonitor({"k": jnp.asarray(params["k"])}, spec, CONFIG)(
        monitor_state, trainable
    )
    want = wanted(spec, params, trainable)
    np.testing.assert_array_equal(np.sort(seen.sets["k"], -1), want)
