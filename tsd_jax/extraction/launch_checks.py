"""What launch refuses: adapters and change rates that no direction can follow from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import Spec

_NOTHING_LEARNED = (
    "launch later, or raise the learning rate before launch (at the start, and in the "
    "first step of a warm-up, nothing has been learned)"
)


def is_traced(tree: Any) -> bool:
    """Return whether any leaf of a tree is a tracer, whose values cannot be read.

    Args:
      tree: any tree.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    """Return whether all values of a tree are finite."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


@jax.jit
def _is_nonzero(tree: Any) -> jax.Array:
    """Return whether any value of a tree differs from 0."""
    return jnp.any(jnp.stack([(x != 0).any() for x in jax.tree.leaves(tree)]))


def check_adapters(trainable: Trainable, spec: Spec, *, ranks_learned: bool) -> None:
    """Raise InputError unless every adapter can be launched; tracers pass.

    Args:
      trainable: as trained before launch.
      spec: of `make_spec`.
      ranks_learned: whether launch depends on what A and B have learned.

    Raises:
      InputError: an adapter has launched already, is not finite, or, where launch
        depends on it, has learned nothing.
    """
    adapters = {path: trainable.adapters[path] for path in spec.paths}
    if is_traced(adapters):
        return
    found = {
        path: (
            _is_finite(jax.tree.leaves(adapter)),
            _is_nonzero(adapter.b),
            adapter.gain is not None and _is_nonzero(adapter.gain),
        )
        for path, adapter in adapters.items()
    }
    for path, (finite, learned, launched) in jax.device_get(found).items():
        if not finite:
            raise InputError(
                f"cannot launch {path}: its adapter is not finite; lower the learning "
                "rate, or look at the data"
            )
        if launched:
            raise InputError(
                f"cannot launch {path}: its gains are not zero, so it has launched "
                "already; a run launches once"
            )
        if ranks_learned and not learned:
            raise InputError(
                f"cannot launch {path}: its B is zero, so there is no change to rank "
                f"directions by; {_NOTHING_LEARNED}"
            )


def check_rates(path: str, rates: Any, method: Method, *, learned: bool) -> None:
    """Raise InputError unless directions can be ranked by a kernel's change rates.

    Args:
      path: path of the kernel.
      rates: its change rates, (*batch, k); tracers pass.
      method: the method; nothing is checked where it needs no delta.
      learned: whether the delta is what training has learned, not one handed in.

    Raises:
      InputError: a rate is not finite, or all are 0.
    """
    if not method.needs_delta or is_traced(rates):
        return
    finite, some = jax.device_get((_is_finite(rates), _is_nonzero(rates)))
    if not finite:
        raise InputError(
            f"cannot launch {path}: its change rates are not finite; look for values "
            f"that are not finite in the {'base' if learned else 'delta or the base'}"
        )
    if not some:
        why = _NOTHING_LEARNED if learned else "pass a delta that is not zero"
        raise InputError(f"cannot launch {path}: all its change rates are 0; {why}")
