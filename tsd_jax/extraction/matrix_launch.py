"""The launch of one matrix: what trains after it, what is frozen, what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from tsd_jax.core.adapter import Directions
from tsd_jax.core.leaves import leaf
from tsd_jax.core.methods import Method
from tsd_jax.core.types import Leaf
from tsd_jax.extraction.deltas import DenseDelta, learned_delta, matrix_norms
from tsd_jax.extraction.knee import knee
from tsd_jax.extraction.ranking import Ranked, RankSettings, rank_delta
from tsd_jax.extraction.restarts import RESTARTS
from tsd_jax.extraction.spectra import DenseSpectrum

Trained = Mapping[str, Any]
"""{field of Adapter: array of one matrix or of a chunk}, the gains left out."""

Started = tuple[Trained, Directions]
"""What trains and the frozen factors of one matrix, right after launch."""


class Ranking(struct.PyTreeNode):
    """What launch saw in one kernel; float32 unless it says otherwise.

    Attributes:
      sigma: singular values, descending, (*batch, k).
      rates: change rate of every core direction, (*batch, k).
      indices: the launched directions, best first, (*batch, c), int32.
      used: number of directions with gains, where launch decides it, (*batch, 1),
        int32; None otherwise.
    """

    sigma: Leaf = struct.field(metadata=leaf("spectrum"))
    rates: Leaf = struct.field(metadata=leaf("spectrum"))
    indices: Leaf = struct.field(metadata=leaf("ranked"))
    used: Leaf = struct.field(
        default=None, metadata=leaf("one", exists=lambda kernel: kernel.gated)
    )


@dataclass(frozen=True, kw_only=True)
class MatrixLaunch:
    """The program that launches one matrix: float64 inside, the adapter's type outside.

    Attributes:
      method: what happens at launch.
      scale: gamma.
      settings: how directions are ranked, and how many are taken.
      knee_budget: most gains a matrix may use, where the knee of its change rates
        decides their number; None where it is fixed.
    """

    method: Method
    scale: float
    settings: RankSettings
    knee_budget: int | None = None

    def __call__(
        self,
        kernel: Float[Array, "in out"],
        trained: Trained,
        noise: Float[Array, "k"],
        delta: Float[Array, "in out"] | None,
        spectrum: DenseSpectrum | None = None,
    ) -> tuple[Started, Ranking]:
        """Return the leaves right after launch, and what was seen.

        Args:
          kernel: K, (in, out), any float type.
          trained: A, (in, r), B, (r, out), and with DoRA m, (out,).
          noise: what the ranking "random" ranks by, (k,).
          delta: dK to rank by, (in, out); None for what A, B and m have learned.
          spectrum: spectrum of the short side's Gram matrix, where it is known.
        """
        dtype, magnitude = trained["a"].dtype, trained["magnitude"]
        a, b = (trained[name].astype(jnp.float64) for name in ("a", "b"))
        ranked = rank_delta(
            kernel,
            learned_delta(kernel, a, b, self.scale, magnitude)
            if delta is None
            else DenseDelta(delta),
            self.settings,
            noise=noise,
            spectrum=spectrum,
        )
        used = None
        if self.knee_budget is not None:
            used = knee(ranked.rates, self.knee_budget)[None]
        a, b, frozen = self._start(ranked, a, b, used)
        if magnitude is not None and self.method.begins_again:
            magnitude = self._norms(kernel, a, b, frozen)
        report = Ranking(
            ranked.sigma.astype(jnp.float32),
            ranked.rates.astype(jnp.float32),
            ranked.indices,
            used,
        )
        started = ({"a": a, "b": b, "magnitude": magnitude}, frozen)
        return jax.tree.map(lambda x: x.astype(dtype), started), report

    def _norms(
        self,
        kernel: Float[Array, "in out"],
        a: Float[Array, "in r"],
        b: Float[Array, "r out"],
        frozen: Directions,
    ) -> Float[Array, "out"]:
        """Return m of a kernel that begins again: the function is K + dK, so c = 1."""
        along = frozen.offset[:, None] * frozen.right.T
        down = jnp.concatenate([a, frozen.left], -1)
        return matrix_norms(kernel, down, jnp.concatenate([self.scale * b, along]))

    def _start(
        self,
        ranked: Ranked,
        a: Float[Array, "in r"],
        b: Float[Array, "r out"],
        used: Int[Array, "1"] | None,
    ) -> tuple[Array, Array, Directions]:
        """Restart A and B where the method says so, and freeze the directions.

        With `keep` the old gamma A B stays beside the new one, frozen, with offset 1.
        """
        rank = a.shape[-1]
        left, right, gate = self._gated(ranked, rank, used)
        offset = jnp.zeros_like(ranked.chosen)
        kept_left, kept_right = a, self.scale * b.T
        if self.method.restart:
            a, b, first = RESTARTS[self.method.start](ranked, rank, self.scale)
            offset = offset.at[:rank].set(first)
        if self.method.keep:
            left = jnp.concatenate([left, kept_left], -1)
            right = jnp.concatenate([right, kept_right], -1)
            offset = jnp.concatenate([offset, jnp.ones(rank, offset.dtype)])
        return a, b, Directions(left, right, offset, gate)

    def _gated(
        self, ranked: Ranked, rank: int, used: Int[Array, "1"] | None
    ) -> tuple[Array, Array, Array | None]:
        """Return L, R and the gate; directions that nothing uses become zero."""
        left, right = ranked.left, ranked.right
        if used is None or self.knee_budget is None:
            return left, right, None
        gate = (jnp.arange(self.knee_budget) < used).astype(left.dtype)
        restarted = rank if self.method.restart else 0
        needed = jnp.maximum(used, restarted)
        live = (jnp.arange(left.shape[-1]) < needed)[None]
        return jnp.where(live, left, 0.0), jnp.where(live, right, 0.0), gate
