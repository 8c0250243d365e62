"""Whether a model can learn to end, by the row of its EOS token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tsd_jax.core import paths
from tsd_jax.core.spec import Spec
from tsd_jax.huggingface import TOKEN_AXES

_MANY = 100
_COSINE = 0.99


def untrained_eos(
    params: Mapping[str, Any], spec: Spec, tokenizer: Any, eos: int | None
) -> str | None:
    """Return a line where the row of EOS is that of tokens never seen in pretraining.

    Such rows are nearly equal to each other, so that no training of other weights can
    tell EOS from them.

    Args:
      params: of a decoder.
      spec: what trains; rows that do are passed over.
      tokenizer: of the model, which knows the token's name.
      eos: id that targets end with; None where they do not.
    """
    if eos is None:
        return None
    flat = paths.flatten(params)
    for path, axis in TOKEN_AXES.items():
        if path not in flat or _trains(spec, path, eos):
            continue
        count = int(_alike(flat[path], eos, axis))
        if count >= _MANY:
            token = tokenizer.convert_ids_to_tokens(eos)
            return (
                f"the base's row of the EOS token {token!r} in {path} was never "
                f"trained: it is nearly equal to those of {count} other tokens, and "
                "the model can hardly learn to end; train it with "
                f'--config.adapter.train_tokens="({token!r},)"'
            )
    return None


def _trains(spec: Spec, path: str, row: int) -> bool:
    """Return whether a row of a parameter trains."""
    parts = [part for part in spec.full if part.path == path]
    covered = any(part.rows is None or row in range(*part.rows) for part in parts)
    return covered or path in spec.paths


@functools.partial(jax.jit, static_argnames="axis")
def _alike(table: jax.Array, row: int, axis: int) -> jax.Array:
    """Return how many other rows have nearly the same direction as one."""
    rows = jnp.moveaxis(table, axis, 0).astype(jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1)
    products = jnp.matmul(rows, rows[row], precision=jax.lax.Precision.HIGHEST)
    near = products > _COSINE * norms * norms[row]
    both_zero = (norms == 0) & (norms[row] == 0)
    return jnp.sum(near | both_zero) - (near | both_zero)[row]
