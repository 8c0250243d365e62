"""Compilation as users have it, for tests that inspect compiled programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

FLAG = "jax_disable_most_optimizations"
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA for programs that run once."""


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """Let XLA optimise what is compiled inside, which tests/conftest.py turns off."""
    jax.config.update(FLAG, False)
    try:
        yield
    finally:
        jax.config.update(FLAG, os.environ.get(FLAG.upper()) == "1")
