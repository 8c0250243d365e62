"""JAX's usual promotion of types, for arithmetic that mixes a model's with float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def standard_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs as usual under `jax_numpy_dtype_promotion=strict`.

    Args:
      function: mixes bfloat16 and float32, or widths of integers, on purpose.
    """

    @functools.wraps(function)
    def promoting(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoting
