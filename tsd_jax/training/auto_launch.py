"""Automatic launch: once the directions that launch would take have settled.

A few matrices are watched, and decomposed once. Every k steps the s directions of the
largest change rates, I_t, are found again and compared with the previous ones:

    overlap_t = mean over the watched matrices of |I_t n I_{t-k}| / s

They have settled when overlap_t >= threshold in `patience` consecutive checks.
Pre-launch takes at least `launch_min` steps and at most `launch_max`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.leaves import leaf_specs
from tsd_jax.core.quantization import stored
from tsd_jax.core.ranges import Count, Range, check_ranges
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.extraction.chunks import plan_chunks
from tsd_jax.extraction.deltas import learned_delta
from tsd_jax.extraction.devices import has_float64, host_device
from tsd_jax.extraction.ranking import EPSILON, RankSettings, top_directions
from tsd_jax.extraction.spectra import decompose

Sample = tuple[tuple[KernelSpec, tuple[int, ...]], ...]
"""(kernel, indices of some of its matrices) for every watched kernel."""

Threshold = Annotated[float, Range(0, 1, "(]")]
"""A mean overlap that directions can reach."""


@dataclass(frozen=True, kw_only=True)
class AutoLaunchConfig:
    """When directions count as settled, in optimizer steps.

    Attributes:
      launch_min: least number of steps before launch.
      launch_max: largest number of steps before launch, settled or not.
      every: k, steps between checks.
      threshold: least mean overlap, in (0, 1].
      patience: number of consecutive checks that must reach the threshold.
      matrices: largest number of matrices to watch; each costs a decomposition at the
        start, and a float64 matrix of its short side while it is watched.
    """

    launch_min: Count
    launch_max: Count
    every: Count = 5
    threshold: Threshold = 0.8
    patience: Count = 3
    matrices: Count = 16

    def __post_init__(self):
        """Refuse settings under which directions could never settle."""
        check_ranges(self, "auto_launch.")
        if self.launch_min > self.launch_max:
            raise InputError(
                f"auto_launch.launch_min {self.launch_min} is larger than "
                f"auto_launch.launch_max {self.launch_max}"
            )
        needed = (self.patience + 1) * self.every
        if needed > self.launch_max:
            raise InputError(
                f"auto_launch.launch_max {self.launch_max} leaves no room to settle: "
                f"patience {self.patience} and every {self.every} need {needed} steps"
            )

    def due(self, step: int) -> bool:
        """Return whether directions are checked after a step.

        Args:
          step: number of steps taken.
        """
        return step % self.every == 0

    def launches(self, step: int, streak: int) -> bool:
        """Return whether to launch after a step.

        Args:
          step: number of steps taken.
          streak: number of consecutive checks that reached the threshold.
        """
        settled = streak >= self.patience or step >= self.launch_max
        return step >= self.launch_min and settled


class MonitorState(struct.PyTreeNode):
    """What the next check needs of the earlier ones; part of the training state.

    Attributes:
      sets: {kernel path: top directions of its watched matrices, (n, s), int32}.
      overlap: mean overlap of the last check, float32 ().
      streak: number of consecutive checks that reached the threshold, int32 ().
      checks: number of checks so far, int32 ().
    """

    sets: Any
    overlap: Any
    streak: Any
    checks: Any


def sample(spec: Spec, count: int) -> Sample:
    """Return at most `count` matrices, spread evenly over kernels and layers.

    In the row of all matrices, kernel after kernel, these are the first, the last, and
    others at equal distances between them.

    Args:
      spec: of `make_spec`.
      count: largest number of matrices.
    """
    every = [
        (kernel, index)
        for kernel in spec.kernels
        for index in range(int(np.prod(kernel.batch_shape)))
    ]
    spread = np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)
    chosen = [every[position] for position in spread]
    return tuple(
        (kernel, tuple(index for owner, index in chosen if owner is kernel))
        for kernel in spec.kernels
        if any(owner is kernel for owner, _ in chosen)
    )


def init_monitor(spec: Spec, config: AutoLaunchConfig) -> MonitorState:
    """Return the state before the first check, whose sets overlap with none.

    Args:
      spec: of `make_spec`.
      config: when directions have settled.
    """
    sets = {
        kernel.path: jnp.full((len(indices), kernel.ranked), -1, jnp.int32)
        for kernel, indices in sample(spec, config.matrices)
    }
    zero = jnp.zeros((), jnp.int32)
    return MonitorState(sets, jnp.zeros((), jnp.float32), zero, zero)


def mean_overlap(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> float:
    """Return the mean over all rows of |I n J| / s.

    Args:
      old: {kernel path: directions I of its matrices, (n, s)}.
      new: {kernel path: directions J of its matrices, (n, s)}.
    """
    shares = [
        len(np.intersect1d(before, after)) / len(after)
        for path in new
        for before, after in zip(old[path], new[path], strict=True)
    ]
    return float(np.mean(shares))


def advance(
    monitor: MonitorState, sets: Mapping[str, np.ndarray], threshold: float
) -> MonitorState:
    """Return the state after a check, in NumPy.

    Args:
      monitor: state before the check.
      sets: {kernel path: top directions of its watched matrices, (n, s)}.
      threshold: least mean overlap.
    """
    old = {path: np.asarray(rows) for path, rows in monitor.sets.items()}
    overlap = mean_overlap(old, sets)
    checks = int(monitor.checks)
    reached = checks > 0 and overlap >= threshold - 1e-9
    streak = int(monitor.streak) + 1 if reached else 0
    new = MonitorState(dict(sets), overlap, streak, checks + 1)
    return jax.tree.map(lambda x, y: np.asarray(x, y.dtype), new, monitor)


def _replicated(array: Any) -> Any:
    """Return the sharding that replicates an array over its devices, or None."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec())


def _here(array: jax.Array) -> jax.Array:
    """Return this process's copy on a device that computes in float64."""
    local = array.addressable_data(0)
    (device,) = local.devices()
    if has_float64(device.platform):
        return local
    return jax.device_put(jax.device_get(local), host_device())


def _matrices(
    kernel: jax.Array, spec: KernelSpec, indices: tuple[int, ...]
) -> jax.Array:
    """Return some matrices (n, in, out) of a stored kernel, moved one by one."""
    plan = plan_chunks(kernel, spec.layout, matrices_per_device=1)
    take = jax.jit(
        lambda kernel, start: plan.matrices(kernel, start)[0],
        out_shardings=_replicated(stored(kernel)),
    )
    return jnp.stack([_here(take(kernel, np.int32(index))) for index in indices])


@functools.partial(jax.jit, static_argnames=("chosen", "sharding"))
def _pick(trainable: Trainable, *, chosen: Sample, sharding: NamedSharding | None):
    """Return {path: {field: leaf}} of the watched matrices, replicated."""

    def rows(adapter: Adapter, indices: tuple[int, ...], name: str) -> Any:
        x, own = getattr(adapter, name), len(leaf_specs(Adapter)[name].axes)
        if x is None:
            return None
        some = x.reshape(-1, *x.shape[-own:])[np.asarray(indices)]
        if sharding is None:
            return some
        return lax.with_sharding_constraint(some, sharding)

    return {
        kernel.path: {
            name: rows(trainable.adapters[kernel.path], indices, name)
            for name in ("a", "b", "magnitude")
        }
        for kernel, indices in chosen
    }


@jax.jit
def _decompose(matrices: jax.Array) -> Any:
    return lax.map(decompose, matrices)


@functools.partial(jax.jit, static_argnames=("chosen", "epsilon"))
def _top(matrices: Any, spectra: Any, factors: Any, *, chosen: Sample, epsilon: float):
    """Return {path: top directions (n, s)}, one matrix after the other."""

    def sets(kernel: KernelSpec) -> jax.Array:
        def one(operands):
            matrix, spectrum, trained = operands
            delta = learned_delta(matrix, gamma=kernel.scale, **trained)
            settings = RankSettings(count=kernel.ranked, epsilon=epsilon)
            return top_directions(matrix, delta, spectrum, settings)

        path = kernel.path
        return lax.map(one, (matrices[path], spectra[path], factors[path]))

    return {kernel.path: sets(kernel) for kernel, _ in chosen}


class DirectionMonitor:
    """The check whether the directions of a few matrices have settled.

    Every process checks on one device of its own, or on its CPU where devices have no
    float64; the result of the first process holds for all.

    Args:
      params: the base's tree.
      spec: of `make_spec`.
      config: when directions have settled.
      epsilon: epsilon of the change rate.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        spec: Spec,
        config: AutoLaunchConfig,
        *,
        epsilon: float = EPSILON,
    ):
        self._threshold, self._epsilon = config.threshold, epsilon
        self._sample = sample(spec, config.matrices)
        kernels = paths.select(params, tuple(k.path for k, _ in self._sample))
        self._matrices = {
            kernel.path: _matrices(kernels[kernel.path], kernel, indices)
            for kernel, indices in self._sample
        }
        with jax.enable_x64(True):
            self._spectra = {p: _decompose(m) for p, m in self._matrices.items()}

    def __call__(self, monitor: MonitorState, trainable: Trainable) -> MonitorState:
        """Return the state after one more check, with the shardings of the old one.

        Args:
          monitor: state before the check.
          trainable: what trains.
        """
        chosen = self._sample
        sharding = _replicated(jax.tree.leaves(trainable)[0])
        picked = _pick(trainable, chosen=chosen, sharding=sharding)
        factors = jax.tree.map(_here, picked)
        with jax.enable_x64(True):
            sets = _top(
                self._matrices,
                self._spectra,
                factors,
                chosen=chosen,
                epsilon=self._epsilon,
            )
        sets = jax.tree.map(np.asarray, sets)
        if jax.process_count() > 1:
            sets = multihost_utils.broadcast_one_to_all(sets)
            sets = jax.tree.map(np.asarray, sets)
        new = advance(monitor, sets, self._threshold)
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), new, monitor)
