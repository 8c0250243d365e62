"""Compile as users do, where it is a compiled program that a test looks at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Let XLA optimise what is compiled inside; tests/conftest.py has it not."""
    jax.config.update(FLAG, False)
    try:
        yield
    finally:
        jax.config.update(FLAG, os.environ.get(FLAG.upper()) == "1")
