"""A matrix seen from its short side and read as float64, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

_GRAM, _SKINNY = 2048, 64  # columns, or stored rows, converted at a time
_ROWS = 512  # fewest rows in a block of the Gram matrix


class BlockedMatrix(NamedTuple):
    """A matrix K of any float type as (n, m), n <= m, in float64.

    Products convert one block of K at a time, so that the whole of K never exists in
    float64. K is the stored matrix, or its transpose where the output side is shorter.

    Attributes:
      stored: the matrix as stored, (in, out), any float type.
    """

    stored: Float[Array, "in out"]

    @property
    def tall(self) -> bool:
        """Whether the short side is the output side."""
        return self.stored.shape[0] > self.stored.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, m), the short side first."""
        short, long = sorted(self.stored.shape)
        return short, long

    def times(self, columns: Float[Array, "m c"]) -> Float[Array, "n c"]:
        """Return K @ columns, (n, c), float64.

        Args:
          columns: (m, c), float64.
        """
        return self._gathered(columns) if self.tall else self._mapped(columns)

    def transposed_times(self, columns: Float[Array, "n c"]) -> Float[Array, "m c"]:
        """Return K^T @ columns, (m, c), float64.

        Args:
          columns: (n, c), float64.
        """
        return self._mapped(columns) if self.tall else self._gathered(columns)

    def output_squares(self) -> Float[Array, "out"]:
        """Return the squared norms of the columns of the stored matrix, (out,)."""

        def add(total: Array, start: Array, size: int) -> Array:
            return total + jnp.sum(self._rows(start, size) ** 2, 0)

        zero = jnp.zeros(self.stored.shape[1])
        return _fold(add, zero, self.stored.shape[0], _SKINNY)

    def gram(self) -> Float[Array, "n n"]:
        """Return K K^T, (n, n), float64; only the lower triangle is filled in.

        Blocks above the diagonal stay zero, which saves almost half of the product.
        """
        n = self.shape[0]
        height = max(_ROWS, -(-n // 8))
        total = jnp.zeros((n, n))
        for row in range(0, n, height):
            stop = min(row + height, n)

            def add(part: Array, start: Array, size: int) -> Array:
                columns = self._block(start, size, stop)  # noqa: B023 - called here
                return part + columns[row:] @ columns.T  # noqa: B023

            part = _fold(add, jnp.zeros((stop - row, stop)), self.shape[1], _GRAM)
            total = lax.dynamic_update_slice(total, part, (row, 0))
        return total

    def _mapped(self, columns: Array) -> Array:
        """Return stored @ columns, a few rows at a time."""

        def put(product: Array, start: Array, size: int) -> Array:
            part = self._rows(start, size) @ columns
            return lax.dynamic_update_slice_in_dim(product, part, start, 0)

        zero = jnp.zeros((self.stored.shape[0], columns.shape[1]))
        return _fold(put, zero, self.stored.shape[0], _SKINNY)

    def _gathered(self, columns: Array) -> Array:
        """Return stored^T @ columns, summed over a few rows at a time."""

        def add(total: Array, start: Array, size: int) -> Array:
            part = lax.dynamic_slice_in_dim(columns, start, size)
            return total + part.T @ self._rows(start, size)

        zero = jnp.zeros((columns.shape[1], self.stored.shape[1]))
        return _fold(add, zero, self.stored.shape[0], _SKINNY).T

    def _rows(self, start: Array, size: int) -> Array:
        """Return stored rows from `start` on as float64, (size, out)."""
        rows = lax.dynamic_slice_in_dim(self.stored, start, size)
        return rows.astype(jnp.float64)

    def _block(self, start: Array, size: int, rows: int) -> Array:
        """Return columns from `start` on of the first rows of K, (rows, size)."""
        long_axis = 0 if self.tall else 1
        block = lax.dynamic_slice_in_dim(self.stored, start, size, long_axis)
        block = (block.T if self.tall else block)[:rows]
        return block.astype(jnp.float64)


def _fold(
    step: Callable[[Array, Int[Array, ""], int], Array],
    carry: Array,
    count: int,
    size: int,
) -> Array:
    """Fold `step` over 0 to `count`, `size` at a time and the remainder last."""
    blocks, rest = divmod(count, size)
    if blocks:
        carry = lax.fori_loop(
            0, blocks, lambda n, total: step(total, n * size, size), carry
        )
    return step(carry, jnp.asarray(blocks * size), rest) if rest else carry
