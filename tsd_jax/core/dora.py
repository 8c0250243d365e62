"""DoRA's magnitudes: the norms of the adapted kernel's columns, trained on their own.

    W' = c o (K + dK),  c_j = m_j / ||K_j + dK_j||,  dK = down @ up

one m_j an output j, the norm over the inputs. It is a constant to the gradient (paper,
section 4.3), and is had without forming K + dK:

    ||K_j + dK_j||^2 = ||K_j||^2 + up_j . (2 down^T K_j + (down^T down) up_j)

Source: arXiv:2402.09353.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import dequantize

_EXACT = lax.Precision.HIGHEST


def squared_norms(
    base: jax.Array, seen: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array:
    """Return ||K_j + dK_j||^2, (*batch, out), of ||K_j||^2 and down^T K (*batch, R, out).

    In float32 the error is that of a sum of squares, about 1e-7 of the norm; where dK
    takes most of a column away, it grows as the share that is left falls, squared.
    """
    gram = jnp.matmul(jnp.swapaxes(down, -1, -2), down, precision=_EXACT)
    moved = 2 * seen + jnp.matmul(gram, up, precision=_EXACT)
    return jnp.maximum(base + jnp.sum(up * moved, -2), 0)


def _norms(
    matrices: jax.Array, down: jax.Array | None, up: jax.Array | None
) -> jax.Array:
    """Return the norms (*batch, out) of matrices, in float32 at least."""
    wide = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    squares = jnp.sum(wide * wide, -2)
    if down is None or up is None:
        return jnp.sqrt(squares)
    wide = wide.astype(jnp.promote_types(wide.dtype, down.dtype))
    seen = jnp.matmul(jnp.swapaxes(down, -1, -2), wide, precision=_EXACT)
    return jnp.sqrt(squared_norms(squares, seen, down, up))


@functools.partial(jax.jit, static_argnames="layout")
def column_norms(
    kernel: jax.Array,
    down: jax.Array | None = None,
    up: jax.Array | None = None,
    *,
    layout: Layout,
) -> jax.Array:
    """Return ||K_j + dK_j|| of every output j of a stored kernel, (*batch, out).

    Costs one read of the kernel and as much arithmetic as a forward pass of R rows.
    Layers stacked by a scan are taken one after the other, as the model takes them, so
    that no more than one of them is ever widened to float32.

    Args:
      kernel: as stored. layout: of its axes.
      down: (*batch, in, R). up: (*batch, R, out); None where nothing is added.
    """
    inner, batch, lifted = layout.visible, layout.batch, layout.lifted
    if not lifted:
        return _norms(inner.to_matrices(dequantize(kernel)), down, up)
    sizes = tuple(kernel.shape[axis] for axis in lifted)
    places = tuple(batch.index(axis) for axis in lifted)

    def rows(x: Any, axes: tuple[int, ...]) -> Any:
        def leaf(part: jax.Array) -> jax.Array:
            first = jnp.moveaxis(part, axes, range(len(axes)))
            return first.reshape(-1, *first.shape[len(axes) :])

        return jax.tree.map(leaf, x)

    def one(parts: tuple[Any, jax.Array | None, jax.Array | None]) -> jax.Array:
        return _norms(inner.to_matrices(dequantize(parts[0])), *parts[1:])

    norms = lax.map(one, (rows(kernel, lifted), rows(down, places), rows(up, places)))
    return jnp.moveaxis(
        norms.reshape(*sizes, *norms.shape[1:]), range(len(sizes)), places
    )


def rescaling(magnitude: jax.Array, norms: jax.Array) -> jax.Array:
    """Return c = m / ||K + dK||, and 1 for columns that are zero, (*batch, out)."""
    return jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1), 1)
