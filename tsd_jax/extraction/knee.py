"""How many directions a kernel deserves: the knee of its sorted change rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FLAT = 1e-9  # depths below the chord, in units of its fall, that are rounding


def knee(rates: jax.Array, budget: int) -> jax.Array:
    """Count the directions before the knee, () int32 in [1, budget].

    Of the n = min(2 budget, k) largest rates, less those that are zero, the logarithms
    are laid below the chord from the first to the last:

        y_j = log rho_(j),  d_j = y_0 + (y_{n-1} - y_0) j / (n - 1) - y_j

    and the knee is the j where d_j is largest: before it rates fall steeply, from it
    on slowly. s = min(j, budget). Where nothing lies below the chord there is no knee,
    and the whole budget (of rates that are not zero) is used.

    Args:
      rates: rho, (k,), in any order.
      budget: the most directions there is room for.

    Source: Satopaa et al., "Finding a Kneedle in a Haystack", ICDCSW 2011, with the
    chord of logarithms and without smoothing.
    """
    window = min(2 * budget, len(rates))
    largest, _ = jax.lax.top_k(rates, window)
    some = largest > 0
    count = jnp.sum(some)
    places = jnp.arange(window)
    logs = jnp.log(jnp.where(some, largest, 1.0))
    fall = logs[0] - logs[jnp.maximum(count - 1, 0)]
    chord = logs[0] - fall * places / jnp.maximum(count - 1, 1)
    depth = jnp.where(some, chord - logs, -jnp.inf)
    bent = jnp.max(depth) > _FLAT * fall
    chosen = jnp.where(bent & (fall > 0), jnp.argmax(depth), budget)
    return jnp.clip(jnp.minimum(chosen, count), 1, budget).astype(jnp.int32)
