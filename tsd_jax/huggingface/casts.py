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
    if not is_finite(new):
        fault = f"too large for {target}: choose another dtype"
        if not is_finite(values):
            fault = "not finite: its training diverged, or its file is damaged"
        raise InputError(f"tensor {name!r} holds values that are {fault}")
    return new


def is_finite(values: np.ndarray) -> bool:
    """Return whether no value is a NaN or an infinity.

    Bits are compared, which is several times as fast as `np.isfinite` for bfloat16.

    Args:
      values: of a float dtype with a sign bit first, then the exponent.
    """
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    magnitudes = values.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
    return bool(magnitudes.max(initial=0) < infinity)
