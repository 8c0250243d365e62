"""What a kernel's directions are ranked by: a change dK, low-rank or full.

A ranking asks a change for p_i = P_i^T dK Q_i only. With Q_i = K^T P_i / sigma_i it
needs P alone, so both kinds answer with sigma_i p_i = P_i^T dK (K^T P_i).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsd_jax.core.spectra import Dense
from tsd_jax.core.tridiagonal import Tridiagonal
from tsd_jax.core.wide import Wide

Spectrum = Dense | Tridiagonal


class LowRank(NamedTuple):
    """Hold dK = scale a b, what training has changed.

    Attributes:
      a: (n, r). b: (r, m). scale: gamma.
    """

    a: jax.Array
    b: jax.Array
    scale: float

    @property
    def transposed(self) -> LowRank:
        """Give dK^T."""
        return LowRank(self.b.T, self.a.T, self.scale)

    @property
    def wide(self) -> LowRank:
        """Give it in float64."""
        a, b = self.a.astype(jnp.float64), self.b.astype(jnp.float64)
        return LowRank(a, b, self.scale)

    def products(self, spectrum: Spectrum, kernel: Wide) -> jax.Array:
        """Give sigma_i p_i of every i, (n,), from two skinny products.

        Args:
          spectrum: of K K^T. kernel: K, (n, m).
        """
        rank = self.a.shape[1]
        seen = spectrum.project(jnp.concatenate([self.a, kernel.times(self.b.T)], 1))
        return self.scale * jnp.sum(seen[:, :rank] * seen[:, rank:], 1)

    def products_of(self, short: jax.Array, long: jax.Array) -> jax.Array:
        """Give sigma_i p_i, (c,), of vectors P_i (n, c) and K^T P_i (m, c)."""
        return self.scale * jnp.sum((short.T @ self.a) * (self.b @ long).T, 1)


class Full(NamedTuple):
    """Hold dK as it is, such as a gradient; its products need all of P.

    Attributes:
      matrix: (n, m).
    """

    matrix: jax.Array

    @property
    def transposed(self) -> Full:
        """Give dK^T."""
        return Full(self.matrix.T)

    @property
    def wide(self) -> Full:
        """Give it in float64."""
        return Full(self.matrix.astype(jnp.float64))

    def products(self, spectrum: Spectrum, kernel: Wide) -> jax.Array:
        """Give sigma_i p_i of every i, (n,): the row sum of (P^T dK K^T) o P^T.

        Raises:
          TypeError: the spectrum does not hold all of P.
        """
        if not isinstance(spectrum, Dense):
            raise TypeError("a full change needs a dense spectrum")
        seen = spectrum.project(kernel.times(self.matrix.T).T)
        return jnp.sum(seen * spectrum.all_vectors.T.astype(jnp.float64), 1)

    def products_of(self, short: jax.Array, long: jax.Array) -> jax.Array:
        """Give sigma_i p_i, (c,), of vectors P_i (n, c) and K^T P_i (m, c)."""
        return jnp.sum(short * (self.matrix @ long), 0)


Change = LowRank | Full
