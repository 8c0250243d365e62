"""A kernel seen from its short side, widened to float64 a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_GRAM, _SKINNY = 2048, 64  # columns, or stored rows, widened at a time
_ROWS = 512  # least rows of a block of the Gram matrix


class BlockedMatrix(NamedTuple):
    """See a matrix K of any float type as (n, m), n <= m, in float64.

    Products widen some of it at a time, so that all of K is never held in float64.

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
        """Return K columns, (n, c), for columns (m, c)."""
        return self._gathered(columns) if self.tall else self._mapped(columns)

    def transposed_times(self, columns: jax.Array) -> jax.Array:
        """Return K^T columns, (m, c), for columns (n, c)."""
        return self._mapped(columns) if self.tall else self._gathered(columns)

    def _mapped(self, columns: jax.Array) -> jax.Array:
        """Return stored @ columns, some rows after the other."""

        def put(whole: jax.Array, start: jax.Array, size: int) -> jax.Array:
            part = self._rows(start, size) @ columns
            return lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        zero = jnp.zeros((self.stored.shape[0], columns.shape[1]))
        return _fold(put, zero, self.stored.shape[0], _SKINNY)

    def _gathered(self, columns: jax.Array) -> jax.Array:
        """Return stored^T @ columns, the sum over some rows after the other."""

        def add(total: jax.Array, start: jax.Array, size: int) -> jax.Array:
            part = lax.dynamic_slice_in_dim(columns, start, size)
            return total + part.T @ self._rows(start, size)

        zero = jnp.zeros((columns.shape[1], self.stored.shape[1]))
        return _fold(add, zero, self.stored.shape[0], _SKINNY).T

    def _rows(self, start: jax.Array, size: int) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(self.stored, start, size)
        return rows.astype(jnp.float64)

    def output_squares(self) -> jax.Array:
        """Return the squared norms of the columns of K as stored, (out,)."""

        def add(total: jax.Array, start: jax.Array, size: int) -> jax.Array:
            return total + jnp.sum(self._rows(start, size) ** 2, 0)

        zero = jnp.zeros(self.stored.shape[1])
        return _fold(add, zero, self.stored.shape[0], _SKINNY)

    def gram(self) -> jax.Array:
        """Return the lower triangle of K K^T, (n, n).

        Blocks above the diagonal are left zero, which saves almost half the product.
        """
        n = self.shape[0]
        height = max(_ROWS, -(-n // 8))
        total = jnp.zeros((n, n))
        for row in range(0, n, height):
            stop = min(row + height, n)

            def add(part: jax.Array, start: jax.Array, size: int) -> jax.Array:
                columns = self._block(start, size, stop)  # noqa: B023 - called here
                return part + columns[row:] @ columns.T  # noqa: B023

            part = _fold(add, jnp.zeros((stop - row, stop)), self.shape[1], _GRAM)
            total = lax.dynamic_update_slice(total, part, (row, 0))
        return total

    def _block(self, start: jax.Array, size: int, rows: int | None = None) -> jax.Array:
        """Widen columns start to start + size of the first rows, (rows, size)."""
        block = lax.dynamic_slice_in_dim(self.stored, start, size, 1 - self.tall)
        block = (block.T if self.tall else block)[:rows]
        return block.astype(jnp.float64)


def _fold(
    step: Callable[[jax.Array, jax.Array, int], jax.Array],
    carry: jax.Array,
    count: int,
    size: int,
) -> jax.Array:
    """Fold `step` over 0 to `count`, `size` at a time and the rest at last."""
    whole, rest = divmod(count, size)
    if whole:
        carry = lax.fori_loop(
            0, whole, lambda n, total: step(total, n * size, size), carry
        )
    return step(carry, jnp.asarray(whole * size), rest) if rest else carry
