"""DoRA's magnitudes: the norms of the adapted kernel's columns, trained separately.

    W' = c o (K + dK),  c_j = m_j / ||K_j + dK_j||,  dK = down @ up

There is one m_j per output j, and the norm is over the inputs. The norm is a constant
to the gradient (paper, section 4.3), and is computed without forming K + dK:

    ||K_j + dK_j||^2 = ||K_j||^2 + up_j . (2 down^T K_j + (down^T down) up_j)

Source: arXiv:2402.09353.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import Quantized, dequantize

_EXACT = lax.Precision.HIGHEST


def squared_norms(
    base: Float[Array, "*batch out"],
    seen: Float[Array, "*batch R out"],
    down: Float[Array, "*batch in R"],
    up: Float[Array, "*batch R out"],
) -> Float[Array, "*batch out"]:
    """Return ||K_j + dK_j||^2 of every output j, (*batch, out).

    In float32 the error is that of a sum of squares, about 1e-7 of the norm. Where dK
    removes most of a column, it grows with the inverse square of the share that is
    left.

    Args:
      base: ||K_j||^2, (*batch, out).
      seen: down^T K, (*batch, R, out).
      down: first factor of dK, (*batch, in, R).
      up: second factor of dK, (*batch, R, out).
    """
    gram = jnp.matmul(jnp.swapaxes(down, -1, -2), down, precision=_EXACT)
    moved = 2 * seen + jnp.matmul(gram, up, precision=_EXACT)
    return jnp.maximum(base + jnp.sum(up * moved, -2), 0)


def _norms(
    matrices: Float[Array, "*batch in out"],
    down: Float[Array, "*batch in R"] | None,
    up: Float[Array, "*batch R out"] | None,
) -> Float[Array, "*batch out"]:
    """Return the norms of the columns of K + dK, (*batch, out), float32 or wider."""
    exact = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    squares = jnp.sum(exact * exact, -2)
    if down is None or up is None:
        return jnp.sqrt(squares)
    exact = exact.astype(jnp.promote_types(exact.dtype, down.dtype))
    seen = jnp.matmul(jnp.swapaxes(down, -1, -2), exact, precision=_EXACT)
    return jnp.sqrt(squared_norms(squares, seen, down, up))


@functools.partial(jax.jit, static_argnames="layout")
def column_norms(
    kernel: Float[Array, "..."] | Quantized,
    down: Float[Array, "*batch in R"] | None = None,
    up: Float[Array, "*batch R out"] | None = None,
    *,
    layout: Layout,
) -> Float[Array, "*batch out"]:
    """Return ||K_j + dK_j|| of every output j of a stored kernel, (*batch, out).

    Costs one read of the kernel and as much arithmetic as a forward pass of R rows.
    Layers stacked by a scan are processed one after the other, as in the model, so that
    at most one of them is converted to float32 at a time.

    Args:
      kernel: as stored, any float type or quantized.
      down: first factor of dK, (*batch, in, R); None where nothing is added.
      up: second factor of dK, (*batch, R, out); None where nothing is added.
      layout: roles of the kernel's axes.

    Returns:
      The norms, float32 or the factors' wider type.
    """
    inner, batch, lifted = layout.visible, layout.batch, layout.lifted
    if not lifted:
        return _norms(inner.to_matrices(dequantize(kernel)), down, up)
    sizes = tuple(kernel.shape[axis] for axis in lifted)
    positions = tuple(batch.index(axis) for axis in lifted)  # among the batch axes

    def rows(x: Any, axes: tuple[int, ...]) -> Any:
        def leaf(part: Array) -> Array:
            first = jnp.moveaxis(part, axes, range(len(axes)))
            return first.reshape(-1, *first.shape[len(axes) :])

        return jax.tree.map(leaf, x)

    def layer(parts: tuple[Any, Array | None, Array | None]) -> Array:
        return _norms(inner.to_matrices(dequantize(parts[0])), *parts[1:])

    factors = (rows(down, positions), rows(up, positions))
    norms = lax.map(layer, (rows(kernel, lifted), *factors))
    return jnp.moveaxis(
        norms.reshape(*sizes, *norms.shape[1:]), range(len(sizes)), positions
    )


def rescaling(
    magnitude: Float[Array, "*batch out"], norms: Float[Array, "*batch out"]
) -> Float[Array, "*batch out"]:
    """Return c = m / ||K + dK||, (*batch, out); 1 for columns that are zero.

    Args:
      magnitude: m, (*batch, out).
      norms: ||K + dK||, (*batch, out).
    """
    return jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)
