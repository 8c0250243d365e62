"""Directions without pre-launch: from the gradient of the loss by singular values.

What a first small step along the singular values would change is

    p_i = -eta dL/dsigma_i,   dL/dsigma_i = P_i^T (dL/dK) Q_i

and eta, like the gradient's own scale, moves no direction past another.
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
"""Bytes of float32 gradients that exist at a time, over all devices."""


def group(kernels: Sequence[KernelSpec], budget: int) -> list[tuple[str, ...]]:
    """Put kernels whose gradients fit the budget together, in order; one at least."""
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
    """Return {path: dL/dK} of the adapted kernels, float32, as they are asked for.

    L is the loss summed over the counted targets of some batches, without dropout,
    at the state's adapters. Only adapted kernels are differentiated, and as many of
    them at a time as fit `memory_budget`: every such group costs a compilation and a
    pass over the batches, and is forgotten when another one is asked for.

    Args:
      loss_fn: (what `bind` returns, micro-batch) -> (summed loss, counted targets).
      bind: puts what trains beside or into the base.
      state: before launch. params: the base's tree. spec: of `make_spec`.
      batches: leaves (micro-batches, examples, positions).
      memory_budget: bytes of gradients at a time.
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
        """Sum the gradients of one group over all micro-batches."""
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
        step = jax.jit(gradients, donate_argnums=1, out_shardings=_places(kernels))
        for batch in self._batches:
            total = step(kernels, total, self._state, self._params, batch)
        return total


def _places(kernels: Mapping[str, jax.Array]) -> Any:
    """Return the kernels' own shardings, or None where they have no named ones."""
    places = {path: getattr(x, "sharding", None) for path, x in kernels.items()}
    named = all(isinstance(place, NamedSharding) for place in places.values())
    return places if named else None
