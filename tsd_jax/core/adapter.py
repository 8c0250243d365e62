"""What lies beside a kernel: what trains, what is frozen, and their product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from tsd_jax.core import paths
from tsd_jax.core.dora import column_norms, rescaling
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, place_full
from tsd_jax.core.leaves import FACTORS, GAINS, LeafSpec, leaf, map_leaves
from tsd_jax.core.methods import Method
from tsd_jax.core.promotion import standard_promotion
from tsd_jax.core.quantization import Kernel, dequantize
from tsd_jax.core.spec import KernelSpec
from tsd_jax.core.types import Leaf


def _restarts(method: Method) -> bool:
    return method.restart


def _launches(kernel: KernelSpec) -> bool:
    return kernel.columns > 0


class Adapter(struct.PyTreeNode):
    """What trains beside one kernel; float32.

    Attributes:
      a: A, (*batch, in, r).
      b: B, (*batch, r, out).
      gain: g, the coordinates along the first s launched directions, (*batch, s); None
        where the method has none.
      kernel: the kernel's static description.
      magnitude: m, the norms of the adapted kernel's columns with DoRA, (*batch, out);
        None without.
    """

    a: Leaf = struct.field(
        metadata=leaf("in", "rank", group=FACTORS, renewed=_restarts)
    )
    b: Leaf = struct.field(
        metadata=leaf("rank", "out", group=FACTORS, renewed=_restarts)
    )
    gain: Leaf = struct.field(
        metadata=leaf(
            "gains",
            group=GAINS,
            exists=lambda kernel: kernel.gains,
            renewed=lambda method: method.gains,
        )
    )
    kernel: KernelSpec = struct.field(pytree_node=False)
    magnitude: Leaf = struct.field(
        default=None,
        metadata=leaf(
            "out",
            group=FACTORS,
            exists=lambda kernel: kernel.dora,
            renewed=lambda method: method.begins_again,
        ),
    )


class Directions(struct.PyTreeNode):
    """What is frozen beside one kernel; zeros until launch, None for `lora`.

    Attributes:
      left: L, (*batch, in, c).
      right: R, (*batch, out, c).
      offset: o, (*batch, c).
      gate: 1 for the gains that a matrix uses and 0 for the others, (*batch, s), where
        launch decides how many it uses; None otherwise.
    """

    left: Leaf = struct.field(metadata=leaf("in", "columns", exists=_launches))
    right: Leaf = struct.field(metadata=leaf("out", "columns", exists=_launches))
    offset: Leaf = struct.field(metadata=leaf("columns", exists=_launches))
    gate: Leaf = struct.field(
        default=None, metadata=leaf("gains", exists=lambda kernel: kernel.gated)
    )


class Trainable(struct.PyTreeNode):
    """All that trains, as one pytree of two named parts.

    Attributes:
      adapters: {kernel path: Adapter}.
      full: {parameter path: FullParam} of the fully trained parameters.
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
"""{kernel path: Directions}."""


def leaves_beside(
    kernel: KernelSpec, make: Callable[[LeafSpec], Any]
) -> tuple[Adapter, Directions]:
    """Return what lies beside a kernel, made leaf by leaf.

    Args:
      kernel: the kernel's description.
      make: LeafSpec -> the leaf: an array, a sharding or a label.
    """
    adapter = Adapter(kernel=kernel, **map_leaves(Adapter, kernel, make))
    return adapter, Directions(**map_leaves(Directions, kernel, make))


def low_rank_factors(
    adapter: Adapter, directions: Directions
) -> tuple[
    Float[Array | np.ndarray, "*batch in R"], Float[Array | np.ndarray, "*batch R out"]
]:
    """Return everything that is added to a kernel as one product.

        dK = gamma A B + L diag(g + o) R^T = down @ up
        down = [A, L],  up = [gamma B; diag(g + o) R^T]

    The forward pass, merging and export all use this form. Gains with a gate enter as
    gate o g.

    Args:
      adapter: what trains beside one kernel.
      directions: what is frozen beside it.

    Returns:
      down (*batch, in, R) and up (*batch, R, out), R = r + c.
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
    adapter: Adapter,
    kernel: Kernel,
    down: Float[Array, "*batch in R"],
    up: Float[Array, "*batch R out"],
) -> Float[Array, "*batch out"] | None:
    """Return DoRA's c = m / ||K + down @ up||, (*batch, out); None without DoRA.

    The norm is a constant to the gradient.

    Args:
      adapter: what trains beside the kernel.
      kernel: K as stored.
      down: first factor, as `low_rank_factors` returns it, (*batch, in, R).
      up: second factor, (*batch, R, out).

    Source: arXiv:2402.09353, section 4.3.
    """
    if adapter.magnitude is None:
        return None
    fixed = jax.lax.stop_gradient((kernel, down, up))
    norms = column_norms(*fixed, layout=adapter.kernel.layout)
    return rescaling(adapter.magnitude, norms)


def _adapted_matrices(
    adapter: Adapter, directions: Directions, kernel: Kernel
) -> tuple[Float[Array, "*batch in out"], Float[Array, "*batch in out"]]:
    """Return K and the adapted kernel, both (*batch, in, out)."""
    down, up = low_rank_factors(adapter, directions)
    added = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    floats = dequantize(kernel)
    base = adapter.kernel.layout.to_matrices(floats).astype(added.dtype)
    total = base + added
    if adapter.magnitude is not None:
        scale = rescaling(adapter.magnitude, jnp.linalg.norm(total, axis=-2))
        total = scale[..., None, :] * total
    return base, total


def delta(
    adapter: Adapter, directions: Directions, kernel: Kernel | None = None
) -> Float[Array, "..."]:
    """Return dK in the kernel's stored shape, in the adapter's type.

    With DoRA it is c o (K + dK) - K, which depends on the kernel.

    Args:
      adapter: what trains beside one kernel.
      directions: what is frozen beside it.
      kernel: K as stored; only needed with DoRA.

    Raises:
      InputError: the adapter has DoRA, and there is no kernel.
    """
    spec = adapter.kernel
    if adapter.magnitude is None:
        down, up = low_rank_factors(adapter, directions)
        added = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    elif kernel is None:
        raise InputError(
            f"{spec.path}: what DoRA adds depends on the kernel; give kernel="
        )
    else:
        base, total = _adapted_matrices(adapter, directions, kernel)
        added = total - base
    return spec.layout.from_matrices(added, spec.shape)


def check_pair(trainable: Any, directions: Any) -> None:
    """Raise InputError unless these are what trains and its directions.

    Args:
      trainable: what was given as such.
      directions: what was given for {kernel path: Directions}.
    """
    if not isinstance(trainable, Trainable):
        raise InputError(
            f"a {type(trainable).__name__} was given for what trains: give the two "
            "that init, launch or load_adapter return, first trainable, then directions"
        )
    held = directions if isinstance(directions, Mapping) else {}
    for path in trainable.adapters:
        if not isinstance(held.get(path), Directions):
            raise InputError(
                f"{path} has no directions: give both that init, launch or "
                "load_adapter return, first trainable, then directions"
            )


@standard_promotion
def merge(
    params: Mapping,
    trainable: Trainable,
    directions: Mapping[str, Directions],
    dtype: DTypeLike | None = None,
) -> Mapping:
    """Return the parameters with every dK added: K + gamma A B + L diag(g + o) R^T.

    With DoRA the columns are scaled to their magnitudes. Fully trained parameters are
    replaced by their trained values. Merging into a bfloat16 kernel rounds away most of
    a small dK; ask for a wider `dtype` to keep it.

    Args:
      params: the base's parameter tree.
      trainable: what trained.
      directions: {kernel path: Directions}.
      dtype: type of the merged leaves; None for each one's own.

    Returns:
      A new tree of the kind given in which only what trained differs; adapted kernels
      that were quantized are floats.

    Raises:
      InputError: a kernel is not in the tree, or has no directions.
    """
    check_pair(trainable, directions)
    base = paths.select(params, trainable.paths)
    merged = {
        path: place_full(base[path], part, dtype)
        for path, part in trainable.full.items()
    }
    for path, adapter in trainable.adapters.items():
        _, total = _adapted_matrices(adapter, directions[path], base[path])
        spec = adapter.kernel
        kernel = spec.layout.from_matrices(total, spec.shape)
        merged[path] = kernel.astype(dtype or base[path].dtype)
    return paths.update(params, merged)
