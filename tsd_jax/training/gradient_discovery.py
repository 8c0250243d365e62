"""Directions without pre-launch: from the gradient of the loss by singular values.

The change that a first small step along the singular values would make is

    p_i = -eta dL/dsigma_i,   dL/dsigma_i = P_i^T (dL/dK) Q_i

and neither eta nor the scale of the gradient affects the ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from tsd_jax.core import paths
from tsd_jax.core.quantization import dequantize
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.core.types import LossFn
from tsd_jax.training.state import TrainState
from tsd_jax.training.step import Bind

MEMORY_BUDGET = 2**32
"""Bytes of float32 gradients held at a time, over all devices."""


def group(kernels: Sequence[KernelSpec], budget: int) -> list[tuple[str, ...]]:
    """Return the paths of kernels in groups whose gradients fit the budget, in order.

    Args:
      kernels: descriptions of the kernels.
      budget: bytes of float32 gradients a group; a larger kernel is a group alone.
    """
    groups: list[tuple[str, ...]] = []
    size = 0
    for kernel in kernels:
        own = 4 * math.prod(kernel.shape)
        if not groups or size + own > budget:
            groups.append(())
            size = 0
        groups[-1] += (kernel.path,)
        size += own
    return groups


class KernelGradients(Mapping):
    """Gradients {path: dL/dK} of the adapted kernels, float32, computed on demand.

    L is the loss summed over the counted targets of some batches, without dropout,
    at the state's adapters. Only adapted kernels are differentiated, as many of them at
    a time as fit `memory_budget`: each group costs a compilation and a pass over the
    batches, and is dropped when a kernel of another one is read.

    Args:
      loss_fn: (what `bind` returns, micro-batch) -> (summed loss, counted targets).
      bind: how adapters meet the base; see `Bind`.
      state: state before launch.
      params: the base's tree.
      spec: of `make_spec`.
      batches: batches of arrays (micro-batches, examples, positions).
      memory_budget: bytes of gradients to hold at a time.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        bind: Bind,
        state: TrainState,
        params: Mapping[str, Any],
        spec: Spec,
        batches: Sequence[Mapping[str, Any]],
        *,
        memory_budget: int = MEMORY_BUDGET,
    ):
        self._loss_fn, self._bind = loss_fn, bind
        self._state, self._params = state, params
        self._batches = batches
        self._groups = group(spec.kernels, memory_budget)
        self._held: dict[str, jax.Array] = {}

    def __iter__(self) -> Iterator[str]:
        return (path for paths_of in self._groups for path in paths_of)

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __getitem__(self, path: str) -> jax.Array:
        if path not in self._held:
            wanted = next((some for some in self._groups if path in some), None)
            if wanted is None:
                raise KeyError(path)
            self._held.clear()
            self._held.update(self._differentiate(wanted))
        return self._held[path]

    def _differentiate(self, wanted: tuple[str, ...]) -> dict[str, jax.Array]:
        """Return the gradients of one group, summed over all micro-batches."""
        chosen = paths.select(self._params, wanted)
        kernels = {path: dequantize(kernel) for path, kernel in chosen.items()}

        def gradients(kernels, total, state, params, batch):
            def loss(kernels, micro):
                base = paths.update(params, kernels)
                bound = self._bind(base, state.trainable, state.directions, None)
                return self._loss_fn(bound, micro)[0]

            def add(total, micro):
                grads = jax.grad(loss)(kernels, micro)
                wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
                return jax.tree.map(jnp.add, total, wide), None

            return jax.lax.scan(add, total, dict(batch))[0]

        def zeros(kernel: Any) -> jax.Array:
            return jnp.zeros_like(kernel, jnp.float32)

        total = jax.tree.map(zeros, kernels)
        step = jax.jit(gradients, donate_argnums=1, out_shardings=_shardings(kernels))
        for batch in self._batches:
            total = step(kernels, total, self._state, self._params, batch)
        return total


def _shardings(kernels: Mapping[str, jax.Array]) -> Any:
    """Return the kernels' own shardings, or None where they have no named ones."""
    shardings = {path: getattr(x, "sharding", None) for path, x in kernels.items()}
    named = all(isinstance(each, NamedSharding) for each in shardings.values())
    return shardings if named else None
