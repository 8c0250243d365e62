"""What is put beside a kernel: what trains, what is frozen, and their product."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tsd_jax.core import paths
from tsd_jax.core.dora import column_norms, rescaling
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, place_full, start_full
from tsd_jax.core.quantization import dequantize
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.core.types import Leaf


class Adapter(struct.PyTreeNode):
    """Hold what trains beside one kernel; shapes (*batch, ...), float32.

    Attributes:
      a: A, (*batch, in, r). b: B, (*batch, r, out).
      gain: g, (*batch, s), the coordinates along the first s launched directions;
        None where the method has none.
      kernel: the kernel's static description.
      magnitude: m, (*batch, out), the norms of the adapted kernel's columns with DoRA;
        None without.
    """

    a: Leaf
    b: Leaf
    gain: Leaf
    kernel: KernelSpec = struct.field(pytree_node=False)
    magnitude: Leaf = None


class Directions(struct.PyTreeNode):
    """Hold what is frozen beside one kernel; zeros until launch, None for `lora`.

    Attributes:
      left: L, (*batch, in, c). right: R, (*batch, out, c).
      offset: o, (*batch, c).
      gate: 1 for the gains a matrix uses, 0 for the others, (*batch, s), where launch
        decides how many it uses; None otherwise.
    """

    left: Leaf
    right: Leaf
    offset: Leaf
    gate: Leaf = None


class Trainable(struct.PyTreeNode):
    """All that trains, as one pytree of two named parts.

    Attributes:
      adapters: {kernel path: Adapter}.
      full: {parameter path: FullParam}, of the parameters that train whole.
    """

    adapters: dict[str, Adapter] = struct.field(default_factory=dict)
    full: dict[str, FullParam] = struct.field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parameters that it changes."""
        return (*self.adapters, *self.full)

    def __contains__(self, path: object) -> bool:
        """Return whether the parameter trains; Flax's own `TrainState` asks it."""
        return path in self.adapters or path in self.full


AllDirections = dict[str, Directions]


def init_kernel(
    key: jax.Array,
    kernel: KernelSpec,
    dtype: jnp.dtype,
    base: jax.Array | None = None,
) -> tuple[Adapter, Directions]:
    """Start one kernel's adapter: A uniform in +-1/sqrt(in), all else zero.

    The same as PEFT's default (`kaiming_uniform_(a=sqrt(5))`). With DoRA the magnitudes
    start at the norms of the base's columns, `base` being the stored kernel.
    """
    batch, size = kernel.batch_shape, (kernel.fan_in, kernel.fan_out)
    bound = size[0] ** -0.5
    a = jax.random.uniform(
        key, (*batch, size[0], kernel.rank), dtype, minval=-bound, maxval=bound
    )
    b = jnp.zeros((*batch, kernel.rank, size[1]), dtype)
    gain = jnp.zeros((*batch, kernel.gains), dtype) if kernel.gains else None
    magnitude = None
    if kernel.dora:
        if base is None:
            raise InputError(
                f"{kernel.path}: DoRA starts at the norms of the base's kernels; give "
                "params=, the base's parameter tree"
            )
        magnitude = column_norms(base, layout=kernel.layout).astype(dtype)
    adapter = Adapter(a, b, gain, kernel, magnitude)
    if not kernel.columns:
        return adapter, Directions(None, None, None)
    return adapter, Directions(
        left=jnp.zeros((*batch, size[0], kernel.columns), dtype),
        right=jnp.zeros((*batch, size[1], kernel.columns), dtype),
        offset=jnp.zeros((*batch, kernel.columns), dtype),
        gate=jnp.zeros((*batch, kernel.gains), dtype) if kernel.gated else None,
    )


def init(
    key: jax.Array,
    spec: Spec,
    dtype: jnp.dtype = jnp.float32,
    *,
    params: Mapping[str, Any] | None = None,
) -> tuple[Trainable, AllDirections]:
    """Create what trains and the directions of a spec; the function does not change.

    Each kernel's key is folded from its path, so that its start does not depend on
    which other kernels are adapted.

    Args:
      key: a JAX random key.
      spec: of `make_spec`.
      dtype: of all leaves; float32 also beside a bfloat16 base.
      params: the base's tree, where parts or DoRA's magnitudes start from it; else it
        is not needed.

    Returns:
      what trains, and {kernel path: Directions}.

    Raises:
      InputError: the spec trains parameters whole or has DoRA, and `params` is missing,
        lacks one or has it in another shape.
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
        full=_start_parts(spec, params, dtype),
    )
    return trainable, {path: pair[1] for path, pair in pairs.items()}


def _start_parts(
    spec: Spec, params: Mapping[str, Any] | None, dtype: jnp.dtype
) -> dict[str, FullParam]:
    """Start what trains whole at the base's own values."""
    if not spec.whole:
        return {}
    if params is None:
        raise InputError(
            f"{spec.whole[0].path} trains whole and starts from the base: give params"
        )
    leaves = paths.select(params, tuple(part.path for part in spec.whole))
    return {
        part.path: start_full(leaves[part.path], part, dtype) for part in spec.whole
    }


def low_rank_factors(
    adapter: Adapter, directions: Directions
) -> tuple[jax.Array, jax.Array]:
    """Write all that is added to a kernel as one product.

        dK = gamma A B + L diag(g + o) R^T = down @ up
        down = [A, L],  up = [gamma B; diag(g + o) R^T]

    The forward pass, merging and export all use this one form. Gains behind a gate
    count as gate o g.

    Returns:
      down (*batch, in, r + c), up (*batch, r + c, out).
    """
    up = adapter.kernel.scale * adapter.b
    if directions.left is None:
        return adapter.a, up
    coordinates = directions.offset
    if adapter.gain is not None:
        gain = adapter.gain
        if directions.gate is not None:
            gain = gain * directions.gate
        unused = coordinates.shape[-1] - gain.shape[-1]
        padding = [(0, 0)] * (gain.ndim - 1) + [(0, unused)]
        coordinates = coordinates + jnp.pad(gain, padding)
    along = coordinates[..., None] * jnp.swapaxes(directions.right, -1, -2)
    return (
        jnp.concatenate([adapter.a, directions.left], -1),
        jnp.concatenate([up, along], -2),
    )


def output_scale(
    adapter: Adapter, kernel: jax.Array, down: jax.Array, up: jax.Array
) -> jax.Array | None:
    """Return DoRA's c = m / ||K + down @ up||, (*batch, out); None without DoRA.

    The norm is a constant to the gradient (arXiv:2402.09353, section 4.3).

    Args:
      adapter: of the kernel. kernel: as stored.
      down, up: of `low_rank_factors`.
    """
    if adapter.magnitude is None:
        return None
    fixed = jax.lax.stop_gradient((kernel, down, up))
    norms = column_norms(*fixed, layout=adapter.kernel.layout)
    return rescaling(adapter.magnitude, norms)


def _adapted_matrices(
    adapter: Adapter, directions: Directions, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return K and the kernel that is used instead, (*batch, in, out)."""
    down, up = low_rank_factors(adapter, directions)
    change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    floats = dequantize(kernel)
    base = adapter.kernel.layout.to_matrices(floats).astype(change.dtype)
    total = base + change
    if adapter.magnitude is not None:
        scale = rescaling(adapter.magnitude, jnp.linalg.norm(total, axis=-2))
        total = scale[..., None, :] * total
    return base, total


def delta(
    adapter: Adapter, directions: Directions, kernel: jax.Array | None = None
) -> jax.Array:
    """Return dK in the kernel's stored shape, in the adapter's dtype.

    With DoRA it is c o (K + dK) - K, which depends on the kernel.

    Args:
      adapter: of one kernel. directions: likewise.
      kernel: K as stored; needed with DoRA alone.

    Raises:
      InputError: the adapter has DoRA, and there is no kernel.
    """
    spec = adapter.kernel
    if adapter.magnitude is None:
        down, up = low_rank_factors(adapter, directions)
        change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    elif kernel is None:
        raise InputError(
            f"{spec.path}: what DoRA adds depends on the kernel; give kernel="
        )
    else:
        base, total = _adapted_matrices(adapter, directions, kernel)
        change = total - base
    return spec.layout.from_matrices(change, spec.shape)


def merge(
    params: Mapping,
    trainable: Trainable,
    directions: Mapping[str, Directions],
    dtype: jnp.dtype | None = None,
) -> dict:
    """Add every dK to its kernel: K + gamma A B + L diag(g + o) R^T.

    With DoRA its columns are scaled to their magnitudes. Parameters that trained whole
    are replaced by their trained values. Merging into a bfloat16 kernel rounds most of
    a small dK away; `dtype` asks for merged kernels in a wider type.

    Args:
      params: the parameter tree.
      trainable: what trained. directions: {kernel path: Directions}.
      dtype: of the merged leaves; None keeps each one's own.

    Returns:
      A new tree in which only what was adapted or trained whole differs; adapted
      kernels that were quantized are floats.

    Raises:
      InputError: a kernel is not in the tree.
    """
    base = paths.select(params, trainable.paths)
    merged = {
        path: place_full(base[path], part, dtype)
        for path, part in trainable.full.items()
    }
    for path, adapter in trainable.adapters.items():
        _, total = _adapted_matrices(adapter, directions[path], base[path])
        spec = adapter.kernel
        whole = spec.layout.from_matrices(total, spec.shape)
        merged[path] = whole.astype(dtype or base[path].dtype)
    return paths.update(params, merged)
