"""What trains and what is frozen before the first step; the function is the base's."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Key

from tsd_jax.core import paths
from tsd_jax.core.adapter import (
    Adapter,
    AllDirections,
    Directions,
    Trainable,
    leaves_beside,
)
from tsd_jax.core.dora import column_norms
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, start_full
from tsd_jax.core.promotion import standard_promotion
from tsd_jax.core.quantization import Kernel
from tsd_jax.core.spec import KernelSpec, Spec


def init_kernel(
    key: Key[Array, ""],
    kernel: KernelSpec,
    dtype: DTypeLike,
    base: Kernel | None = None,
) -> tuple[Adapter, Directions]:
    """Return one kernel's start: A uniform in +-1/sqrt(in), all else zero.

    The same as PEFT's default (`kaiming_uniform_(a=sqrt(5))`). With DoRA the magnitudes
    start at the norms of the base's columns.

    Args:
      key: a JAX random key.
      kernel: the kernel's description.
      dtype: type of all leaves.
      base: the stored kernel; only needed with DoRA.

    Raises:
      InputError: the kernel has DoRA, and there is no base.
    """
    adapter, directions = leaves_beside(
        kernel, lambda spec: jnp.zeros(spec.shape(kernel), dtype)
    )
    bound = kernel.fan_in**-0.5
    a = jax.random.uniform(key, adapter.a.shape, dtype, minval=-bound, maxval=bound)
    adapter = adapter.replace(a=a)
    if kernel.dora:
        if base is None:
            raise InputError(
                f"{kernel.path}: DoRA starts at the norms of the base's kernels; give "
                "params=, the base's parameter tree"
            )
        norms = column_norms(base, layout=kernel.layout)
        adapter = adapter.replace(magnitude=norms.astype(dtype))
    return adapter, directions


@standard_promotion
def init(
    key: Key[Array, ""],
    spec: Spec,
    dtype: DTypeLike = jnp.float32,
    *,
    params: Mapping[str, Any] | None = None,
) -> tuple[Trainable, AllDirections]:
    """Return what trains and the directions of a spec; the function does not change.

    Each kernel's key is folded from its path, so that its start does not depend on
    which other kernels are adapted.

    Args:
      key: a JAX random key.
      spec: as `make_spec` returns it.
      dtype: type of all leaves; float32 also beside a bfloat16 base.
      params: the base's parameter tree; only needed for fully trained parameters and
        DoRA's magnitudes, which start from it.

    Returns:
      What trains, and {kernel path: Directions}.

    Raises:
      InputError: the spec has fully trained parameters or DoRA, and `params` is
        missing, lacks one of them or has it in another shape.
    """
    dora = tuple(kernel.path for kernel in spec.kernels if kernel.dora)
    bases = {} if params is None else paths.select(params, dora)
    keys = {
        path: jax.random.fold_in(key, zlib.crc32(path.encode())) for path in spec.paths
    }
    pairs = {
        k.path: init_kernel(keys[k.path], k, dtype, bases.get(k.path))
        for k in spec.kernels
    }
    trainable = Trainable(
        adapters={path: pair[0] for path, pair in pairs.items()},
        full=_start_full_params(spec, params, dtype),
    )
    return trainable, {path: pair[1] for path, pair in pairs.items()}


def _start_full_params(
    spec: Spec, params: Mapping[str, Any] | None, dtype: DTypeLike
) -> dict[str, FullParam]:
    """Return the fully trained parameters at the base's values."""
    if not spec.full:
        return {}
    if params is None:
        raise InputError(
            f"{spec.full[0].path} trains in full and starts from the base: give "
            "params=, the base's parameter tree"
        )
    leaves = paths.select(params, tuple(part.path for part in spec.full))
    return {part.path: start_full(leaves[part.path], part, dtype) for part in spec.full}
