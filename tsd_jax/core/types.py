"""Types that several rooms share, each with one meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

Leaf = Any
"""A jax.Array; in trees derived from a tree of arrays: its shape, sharding or label."""

Batch = Mapping[str, Any]
"""{name: array (examples, positions)}, of one kind of data."""

LossFn = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
"""(what binds the model, batch) -> (summed loss (), counted targets ())."""

Progress = Callable[[int, int], None]
"""(done so far, of how many) -> None."""
