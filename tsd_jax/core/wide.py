"""A kernel seen from its short side, widened to float64 a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_GRAM, _SKINNY = 2048, 256  # columns widened at a time
_ROWS = 512  # least rows of a block of the Gram matrix


class Wide(NamedTuple):
    """See a matrix K of any float type as (n, m), n <= m, in float64.

    All of K is never held in float64: a product widens some columns at a time.

    Attributes:
      stored: K, (in, out), as it lies.
    """

    stored: jax.Array

    @property
    def tall(self) -> bool:
        """Whether the short side is the output side."""
        return self.stored.shape[0] > self.stored.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m), the short side first."""
        short, long = sorted(self.stored.shape)
        return short, long

    def times(self, columns: jax.Array) -> jax.Array:
        """Give K columns, (n, c), for columns (m, c)."""

        def add(total: jax.Array, start: jax.Array, size: int) -> jax.Array:
            part = lax.dynamic_slice_in_dim(columns, start, size)
            return total + self._block(start, size) @ part

        zero = jnp.zeros((self.shape[0], columns.shape[1]))
        return self._over(add, zero, _SKINNY)

    def transposed_times(self, columns: jax.Array) -> jax.Array:
        """Give K^T columns, (m, c), for columns (n, c)."""

        def put(whole: jax.Array, start: jax.Array, size: int) -> jax.Array:
            part = self._block(start, size).T @ columns
            return lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        zero = jnp.zeros((self.shape[1], columns.shape[1]))
        return self._over(put, zero, _SKINNY)

    def gram(self) -> jax.Array:
        """Give the lower triangle of K K^T, (n, n).

        Blocks above the diagonal are left zero, which saves almost half the product.
        """
        n = self.shape[0]
        starts = range(0, n, max(_ROWS, -(-n // 8)))

        def add(total: jax.Array, start: jax.Array, size: int) -> jax.Array:
            columns = self._block(start, size)
            for row in starts:
                stop = min(row + starts.step, n)
                part = total[row:stop, :stop] + columns[row:stop] @ columns[:stop].T
                total = total.at[row:stop, :stop].set(part)
            return total

        return self._over(add, jnp.zeros((n, n)), _GRAM)

    def _block(self, start: jax.Array, size: int) -> jax.Array:
        """Widen columns start to start + size, (n, size)."""
        block = lax.dynamic_slice_in_dim(self.stored, start, size, 1 - self.tall)
        block = block.astype(jnp.float64)
        return block.T if self.tall else block

    def _over(
        self,
        step: Callable[[jax.Array, jax.Array, int], jax.Array],
        carry: jax.Array,
        size: int,
    ) -> jax.Array:
        """Fold `step` over all columns, `size` at a time and the rest at last."""
        whole, rest = divmod(self.shape[1], size)
        if whole:
            carry = lax.fori_loop(
                0, whole, lambda n, total: step(total, n * size, size), carry
            )
        return step(carry, jnp.asarray(whole * size), rest) if rest else carry
