"""What a kernel's directions are ranked by: a change dK, low-rank, full or DoRA's.

A ranking asks a change for p_i = P_i^T dK Q_i only. With Q_i = K^T P_i / sigma_i it
needs P alone, so every kind answers with sigma_i p_i = P_i^T dK (K^T P_i).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.core.dora import rescaling, squared_norms
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.spectra import Dense
from tsd_jax.extraction.tridiagonal import Tridiagonal

Spectrum = Dense | Tridiagonal
_BLOCK = 64  # directions looked at together where all of them are


class LowRankDelta(NamedTuple):
    """Hold dK = scale a b, what training has changed.

    Attributes:
      a: (n, r). b: (r, m). scale: gamma.
    """

    a: jax.Array
    b: jax.Array
    scale: float

    @property
    def transposed(self) -> LowRankDelta:
        """Return dK^T."""
        return LowRankDelta(self.b.T, self.a.T, self.scale)

    @property
    def wide(self) -> LowRankDelta:
        """Return it in float64."""
        a, b = self.a.astype(jnp.float64), self.b.astype(jnp.float64)
        return LowRankDelta(a, b, self.scale)

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> jax.Array:
        """Return sigma_i p_i of every i, (n,), from two skinny products.

        Args:
          spectrum: of K K^T. kernel: K, (n, m).
        """
        rank = self.a.shape[1]
        seen = spectrum.project(jnp.concatenate([self.a, kernel.times(self.b.T)], 1))
        return self.scale * jnp.sum(seen[:, :rank] * seen[:, rank:], 1)

    def products_of(self, short: jax.Array, long: jax.Array) -> jax.Array:
        """Return sigma_i p_i, (c,), of vectors P_i (n, c) and K^T P_i (m, c)."""
        return self.scale * jnp.sum((short.T @ self.a) * (self.b @ long).T, 1)


class DenseDelta(NamedTuple):
    """Hold dK as it is, such as a gradient; its products need all of P.

    Attributes:
      matrix: (n, m).
    """

    matrix: jax.Array

    @property
    def transposed(self) -> DenseDelta:
        """Return dK^T."""
        return DenseDelta(self.matrix.T)

    @property
    def wide(self) -> DenseDelta:
        """Return it in float64."""
        return DenseDelta(self.matrix.astype(jnp.float64))

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> jax.Array:
        """Return sigma_i p_i of every i, (n,): the row sum of (P^T dK K^T) o P^T.

        Raises:
          TypeError: the spectrum does not hold all of P.
        """
        if not isinstance(spectrum, Dense):
            raise TypeError("a full change needs a dense spectrum")
        seen = spectrum.project(kernel.times(self.matrix.T).T)
        return jnp.sum(seen * spectrum.all_vectors.T.astype(jnp.float64), 1)

    def products_of(self, short: jax.Array, long: jax.Array) -> jax.Array:
        """Return sigma_i p_i, (c,), of vectors P_i (n, c) and K^T P_i (m, c)."""
        return jnp.sum(short * (self.matrix @ long), 0)


class DoraDelta(NamedTuple):
    """Hold DoRA's dW = (K + gamma A B) C - K = K (C - I) + gamma A B C, C = diag(c).

        p_i = sigma_i Q_i^T (C - I) Q_i + gamma (P_i^T A)(B C Q_i)

    The first term sees the squared entries of every Q_i, so its products need all of P.
    Where the outputs are the short side these are P's own; else K^T P is formed some
    columns at a time, once more the arithmetic of two Gram matrices.

    Attributes:
      low_rank: gamma A (B C), c within. excess: c - 1, (out,).
      short: whether the outputs are the short side, as once transposed.
    """

    low_rank: LowRankDelta
    excess: jax.Array
    short: bool = False

    @classmethod
    def of(cls, a: jax.Array, b: jax.Array, gamma: float, c: jax.Array) -> DoraDelta:
        """Make it of A (in, r), B (r, out), gamma and c (out,)."""
        return cls(LowRankDelta(a, b * c[None], gamma), c - 1)

    @property
    def transposed(self) -> DoraDelta:
        """Return dW^T."""
        return DoraDelta(self.low_rank.transposed, self.excess, not self.short)

    @property
    def wide(self) -> DoraDelta:
        """Return it in float64."""
        excess = self.excess.astype(jnp.float64)
        return DoraDelta(self.low_rank.wide, excess, self.short)

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> jax.Array:
        """Return sigma_i p_i of every i, (n,).

        Raises:
          TypeError: the spectrum does not hold all of P.
        """
        if not isinstance(spectrum, Dense):
            raise TypeError("DoRA's change needs a dense spectrum")
        learned = self.low_rank.products(spectrum, kernel)
        if self.short:
            squares = spectrum.all_vectors.astype(jnp.float64) ** 2
            return learned + spectrum.eigenvalues * (self.excess @ squares)

        def along(start: jax.Array) -> jax.Array:
            indices = jnp.minimum(start + jnp.arange(_BLOCK), kernel.shape[0] - 1)
            long = kernel.transposed_times(spectrum.vectors(indices))
            return self.excess @ long**2

        starts = jnp.arange(0, kernel.shape[0], _BLOCK)
        return learned + lax.map(along, starts).reshape(-1)[: kernel.shape[0]]

    def products_of(self, short: jax.Array, long: jax.Array) -> jax.Array:
        """Return sigma_i p_i, (c,), of vectors P_i (n, c) and K^T P_i (m, c)."""
        learned = self.low_rank.products_of(short, long)
        if self.short:
            return learned + jnp.sum(long**2, 0) * (self.excess @ short**2)
        return learned + self.excess @ long**2


Delta = LowRankDelta | DenseDelta | DoraDelta


def learned_delta(
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    gamma: float,
    magnitude: jax.Array | None = None,
) -> LowRankDelta | DoraDelta:
    """Return what training has changed before launch: gamma A B, with DoRA dW; float64.

    Args:
      kernel: K, (in, out). a: A, (in, r). b: B, (r, out).
      magnitude: m, (out,); None without DoRA.
    """
    a, b = a.astype(jnp.float64), b.astype(jnp.float64)
    if magnitude is None:
        return LowRankDelta(a, b, gamma)
    norms = matrix_norms(kernel, a, gamma * b)
    return DoraDelta.of(a, b, gamma, rescaling(magnitude.astype(jnp.float64), norms))


def matrix_norms(kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """Return ||K_j + dK_j||, (out,), of one matrix, in float64 some rows at a time.

    Args:
      kernel: K, (in, out), any float type. down: (in, R). up: (R, out); float64.
    """
    wide = BlockedMatrix(kernel)
    seen = wide.times(down) if wide.tall else wide.transposed_times(down)
    return jnp.sqrt(squared_norms(wide.output_squares(), seen.T, down, up))
