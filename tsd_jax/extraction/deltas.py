"""The delta dK that directions are ranked by: low-rank, dense or DoRA's.

A ranking only asks a delta for p_i = P_i^T dK Q_i. With Q_i = K^T P_i / sigma_i this
needs P alone, so every class here answers with sigma_i p_i = P_i^T dK (K^T P_i).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from tsd_jax.core.dora import rescaling, squared_norms
from tsd_jax.extraction.blocked import BlockedMatrix
from tsd_jax.extraction.spectra import DenseSpectrum
from tsd_jax.extraction.tridiagonal import TridiagonalSpectrum

Spectrum = DenseSpectrum | TridiagonalSpectrum
_BLOCK = 64  # directions evaluated at a time where all of them are needed


class LowRankDelta(NamedTuple):
    """dK = scale a b, as learned by A and B.

    Attributes:
      a: (n, r).
      b: (r, m).
      scale: gamma.
    """

    a: Float[Array, "n r"]
    b: Float[Array, "r m"]
    scale: float

    @property
    def transposed(self) -> LowRankDelta:
        """dK^T."""
        return LowRankDelta(self.b.T, self.a.T, self.scale)

    @property
    def as_float64(self) -> LowRankDelta:
        """The same delta in float64."""
        a, b = self.a.astype(jnp.float64), self.b.astype(jnp.float64)
        return LowRankDelta(a, b, self.scale)

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> Float[Array, "n"]:
        """Return sigma_i p_i of every i, (n,), from two skinny products.

        Args:
          spectrum: spectrum of K K^T.
          kernel: K, (n, m).
        """
        rank = self.a.shape[1]
        seen = spectrum.project(jnp.concatenate([self.a, kernel.times(self.b.T)], 1))
        return self.scale * jnp.sum(seen[:, :rank] * seen[:, rank:], 1)

    def products_of(
        self, short: Float[Array, "n c"], long: Float[Array, "m c"]
    ) -> Float[Array, "c"]:
        """Return sigma_i p_i of some directions, (c,).

        Args:
          short: P_i, (n, c).
          long: K^T P_i, (m, c).
        """
        return self.scale * jnp.sum((short.T @ self.a) * (self.b @ long).T, 1)


class DenseDelta(NamedTuple):
    """dK as a full matrix, such as a gradient; its products need all of P.

    Attributes:
      matrix: dK, (n, m).
    """

    matrix: Float[Array, "n m"]

    @property
    def transposed(self) -> DenseDelta:
        """dK^T."""
        return DenseDelta(self.matrix.T)

    @property
    def as_float64(self) -> DenseDelta:
        """The same delta in float64."""
        return DenseDelta(self.matrix.astype(jnp.float64))

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> Float[Array, "n"]:
        """Return sigma_i p_i of every i, (n,): the row sums of (P^T dK K^T) o P^T.

        Args:
          spectrum: spectrum of K K^T, dense.
          kernel: K, (n, m).

        Raises:
          TypeError: the spectrum does not hold all of P.
        """
        dense = _require_dense(spectrum, "a full delta")
        seen = dense.project(kernel.times(self.matrix.T).T)
        return jnp.sum(seen * dense.all_vectors.T.astype(jnp.float64), 1)

    def products_of(
        self, short: Float[Array, "n c"], long: Float[Array, "m c"]
    ) -> Float[Array, "c"]:
        """Return sigma_i p_i of some directions, (c,).

        Args:
          short: P_i, (n, c).
          long: K^T P_i, (m, c).
        """
        return jnp.sum(short * (self.matrix @ long), 0)


class DoraDelta(NamedTuple):
    """DoRA's dW = (K + gamma A B) C - K = K (C - I) + gamma A B C, C = diag(c).

        p_i = sigma_i Q_i^T (C - I) Q_i + gamma (P_i^T A)(B C Q_i)

    The first term needs the squared entries of every Q_i, so its products need all of
    P. Where the outputs are the short side these are P's own entries; otherwise K^T P
    is formed a few columns at a time, at the cost of two more Gram matrices.

    Attributes:
      low_rank: gamma A (B C), with c folded into B.
      excess: c - 1, (out,).
      outputs_short: whether the outputs are the short side, as after transposing once.
    """

    low_rank: LowRankDelta
    excess: Float[Array, "out"]
    outputs_short: bool = False

    @classmethod
    def of(
        cls,
        a: Float[Array, "in r"],
        b: Float[Array, "r out"],
        gamma: float,
        c: Float[Array, "out"],
    ) -> DoraDelta:
        """Return the delta of given factors and column scales.

        Args:
          a: A, (in, r).
          b: B, (r, out).
          gamma: scale of A B.
          c: scale of every output, (out,).
        """
        return cls(LowRankDelta(a, b * c[None], gamma), c - 1)

    @property
    def transposed(self) -> DoraDelta:
        """dW^T."""
        return DoraDelta(self.low_rank.transposed, self.excess, not self.outputs_short)

    @property
    def as_float64(self) -> DoraDelta:
        """The same delta in float64."""
        excess = self.excess.astype(jnp.float64)
        return DoraDelta(self.low_rank.as_float64, excess, self.outputs_short)

    def products(self, spectrum: Spectrum, kernel: BlockedMatrix) -> Float[Array, "n"]:
        """Return sigma_i p_i of every i, (n,).

        Args:
          spectrum: spectrum of K K^T, dense.
          kernel: K, (n, m).

        Raises:
          TypeError: the spectrum does not hold all of P.
        """
        dense = _require_dense(spectrum, "DoRA's delta")
        learned = self.low_rank.products(dense, kernel)
        if self.outputs_short:
            squares = dense.all_vectors.astype(jnp.float64) ** 2
            return learned + dense.eigenvalues * (self.excess @ squares)

        def along(start: Array) -> Array:
            indices = jnp.minimum(start + jnp.arange(_BLOCK), kernel.shape[0] - 1)
            long = kernel.transposed_times(dense.vectors(indices))
            return self.excess @ long**2

        starts = jnp.arange(0, kernel.shape[0], _BLOCK)
        return learned + lax.map(along, starts).reshape(-1)[: kernel.shape[0]]

    def products_of(
        self, short: Float[Array, "n c"], long: Float[Array, "m c"]
    ) -> Float[Array, "c"]:
        """Return sigma_i p_i of some directions, (c,).

        Args:
          short: P_i, (n, c).
          long: K^T P_i, (m, c).
        """
        learned = self.low_rank.products_of(short, long)
        if self.outputs_short:
            return learned + jnp.sum(long**2, 0) * (self.excess @ short**2)
        return learned + self.excess @ long**2


Delta = LowRankDelta | DenseDelta | DoraDelta


def _require_dense(spectrum: Spectrum, delta: str) -> DenseSpectrum:
    """Return the spectrum; raise TypeError if it does not hold every eigenvector."""
    if not isinstance(spectrum, DenseSpectrum):
        raise TypeError(f"{delta} needs a dense spectrum")
    return spectrum


def learned_delta(
    kernel: Float[Array, "in out"],
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    gamma: float,
    magnitude: Float[Array, "out"] | None = None,
) -> LowRankDelta | DoraDelta:
    """Return the delta learned before launch, in float64: gamma A B, or DoRA's dW.

    Args:
      kernel: K, (in, out), any float type.
      a: A, (in, r).
      b: B, (r, out).
      gamma: scale of A B.
      magnitude: m, (out,); None without DoRA.

    Source: arXiv:2402.09353 for dW.
    """
    a, b = a.astype(jnp.float64), b.astype(jnp.float64)
    if magnitude is None:
        return LowRankDelta(a, b, gamma)
    norms = matrix_norms(kernel, a, gamma * b)
    return DoraDelta.of(a, b, gamma, rescaling(magnitude.astype(jnp.float64), norms))


def matrix_norms(
    kernel: Float[Array, "in out"],
    down: Float[Array, "in R"],
    up: Float[Array, "R out"],
) -> Float[Array, "out"]:
    """Return ||K_j + dK_j|| of every output j of one matrix, (out,), float64.

    Reads a few rows of the kernel at a time.

    Args:
      kernel: K, (in, out), any float type.
      down: first factor of dK = down @ up, (in, R), float64.
      up: second factor, (R, out), float64.
    """
    blocked = BlockedMatrix(kernel)
    seen = (
        blocked.times(down) if blocked.tall else blocked.transposed_times(down)
    )  # K^T down of the stored K
    return jnp.sqrt(squared_norms(blocked.output_squares(), seen.T, down, up))
