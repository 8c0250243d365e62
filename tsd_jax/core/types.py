"""Types shared across the package, each with one meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

Leaf = Any
"""A jax.Array; in a tree derived from one of arrays, its shape, sharding or label."""

Batch = Mapping[str, Any]
"""{name: array (examples, positions)}."""

LossFn = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
"""(bound model or its variables, batch) -> (sum of losses, (); counted targets, ())."""

Progress = Callable[[int, int], None]
"""(number done, total number) -> None."""
