"""The check that a model with adapters is its merged form, once before it trains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tsd_jax
from tsd_jax.app.caches import cache_folder
from tsd_jax.app.model import Base
from tsd_jax.binding.linen import check
from tsd_jax.core import paths
from tsd_jax.core.quantization import Quantized
from tsd_jax.core.spec import Spec
from tsd_jax.storage.atomic import write_text

LENGTH = 8
"""Tokens of the one example that the models are compared on."""

# The share of a device's memory that merged kernels may take beside the base, and the
# bytes that are taken for a quarter where a device does not tell its memory.
_SHARE, _BYTES = 0.25, 4 * 2**30


def check_first(
    base: Base,
    params: Mapping[str, Any],
    spec: Spec,
    batch: Mapping[str, jax.Array | np.ndarray],
    cache_dir: str,
) -> str:
    """Check the bound model against the merged one; return a line on what was done.

    What has passed is noted in the cache folder and not checked again: it depends on
    the model's config, what is adapted, and versions alone.

    Args:
      base: the model.
      params: its parameters, loaded.
      spec: what is adapted.
      batch: the first one, "tokens" (micro-batches, B, T) among it.
      cache_dir: of the settings.

    Raises:
      InputError: they differ; the line names the kernel that does most of it.
    """
    reason = _unchecked(params, spec)
    if reason:
        return f"adapters not checked against merged kernels: {reason}"
    note = _note(base, spec, cache_dir)
    if note is not None and note.exists():
        return "adapters checked against merged kernels by an earlier run"
    tokens = jax.device_get(batch["tokens"][0, :1, :LENGTH])
    check(base.network.apply, {"params": params}, spec, tokens)
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, "passed\n")
    return "adapters checked against merged kernels: the same outputs"


def _unchecked(params: Mapping[str, Any], spec: Spec) -> str:
    """Return why nothing is compared; "" if it is."""
    if jax.process_count() > 1:
        return "several processes"
    found = paths.select(params, tuple(kernel.path for kernel in spec.kernels))
    if any(isinstance(kernel, Quantized) for kernel in found.values()):
        return "the base is quantized"
    size = sum(_bytes_of_one(kernel) for kernel in found.values())
    if size > _room():
        return f"a merged copy of the kernels takes {size / 2**30:.1f} GiB a device"
    return ""


def _bytes_of_one(kernel: jax.Array) -> int:
    """Return the most bytes of an array that one device holds."""
    return max((shard.data.nbytes for shard in kernel.addressable_shards), default=0)


def _room() -> float:
    """Return the bytes that merged kernels may take on a device."""
    limits = [(each.memory_stats() or {}).get("bytes_limit") for each in jax.devices()]
    return min(_SHARE * limit if limit else _BYTES for limit in limits)


def _note(base: Base, spec: Spec, cache_dir: str) -> Path | None:
    """Return the file that says that the check has passed; None without a cache."""
    folder = cache_folder(cache_dir)
    if folder is None:
        return None
    facts = (tsd_jax.__version__, jax.__version__, base.network, spec)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return folder / "checked" / name
