"""Casts of weights to the dtype of a file, refused where a value does not survive."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError


def cast(values: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """Return a tensor in another dtype.

    Args:
      values: of the tensor.
      dtype: a float dtype.
      name: of the tensor, for messages.

    Raises:
      InputError: a value is not finite, or too large for the dtype.
    """
    target = jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        new = values.astype(target, copy=False)
    if not np.isfinite(new).all():
        fault = f"too large for {target}: choose another dtype"
        if not np.isfinite(values).all():
            fault = "not finite: its training diverged, or its file is damaged"
        raise InputError(f"tensor {name!r} holds values that are {fault}")
    return new
