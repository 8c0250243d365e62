"""How many directions a kernel needs: the knee of its sorted change rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

_FLAT = 1e-9  # depths below the chord, relative to its fall, that are rounding errors


def knee(rates: Float[Array, "k"], budget: int) -> Int[Array, ""]:
    """Return the number of directions before the knee, (), int32, in [1, budget].

    Takes the n = min(2 budget, k) largest rates that are not zero, and measures how far
    their logarithms lie below the chord from the first to the last:

        y_j = log rho_(j),  d_j = y_0 + (y_{n-1} - y_0) j / (n - 1) - y_j

    The knee is the j where d_j is largest: before it rates fall steeply, after it
    slowly. The result is min(j, budget). Where nothing lies below the chord there is no
    knee, and the whole budget is used, as far as rates are not zero.

    Args:
      rates: rho, (k,), in any order.
      budget: largest number of directions allowed.

    Source: Satopaa et al., "Finding a Kneedle in a Haystack", ICDCSW 2011, with the
    chord of logarithms and without smoothing.
    """
    window = min(2 * budget, len(rates))
    largest, _ = jax.lax.top_k(rates, window)
    nonzero = largest > 0
    count = jnp.sum(nonzero)
    logs = jnp.log(jnp.where(nonzero, largest, 1.0))
    fall = logs[0] - logs[jnp.maximum(count - 1, 0)]
    chord = logs[0] - fall * jnp.arange(window) / jnp.maximum(count - 1, 1)
    depth = jnp.where(nonzero, chord - logs, -jnp.inf)
    bent = jnp.max(depth) > _FLAT * fall
    chosen = jnp.where(bent & (fall > 0), jnp.argmax(depth), budget)
    return jnp.clip(jnp.minimum(chosen, count), 1, budget).astype(jnp.int32)
