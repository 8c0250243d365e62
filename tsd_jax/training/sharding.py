"""Shardings of every array on a data x fsdp x tensor mesh, by rules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Directions, Trainable, leaves_beside
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.core.leaves import KernelAxes
from tsd_jax.core.quantization import cut_shape
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.training.state import TrainState

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(None, ("data", "fsdp"), None)
"""Axes of a batch array: micro-batch, example, position."""


def make_mesh(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return the devices as a mesh data x fsdp x tensor.

    Args:
      shape: three sizes; one of them may be -1 for what the others leave.
      devices: devices of the mesh; None for all.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(shape)
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or 0 in sizes or min(sizes) < -1:
        raise InputError(
            f"mesh {tuple(shape)} must be three sizes {AXES}, at most one of them -1"
        )
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh {tuple(shape)} needs {math.prod(sizes)} devices, "
            f"but there are {len(devices)}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)


def _axis_size(mesh: Mesh, axis: Any) -> int:
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[name] for name in names if name is not None)


def _fit(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Return a spec without the axes that the mesh does not divide."""
    axes = (*spec, *(None,) * (len(shape) - len(spec)))
    return PartitionSpec(
        *(
            axis if axis and size % _axis_size(mesh, axis) == 0 else None
            for size, axis in zip(shape, axes, strict=True)
        )
    )


def param_shardings(
    params: Mapping[str, Any],
    rules: Sequence[tuple[str, PartitionSpec]],
    mesh: Mesh,
) -> dict[str, Any]:
    """Return every parameter's sharding, by the first rule that matches its full path.

    An axis that the mesh does not divide is not sharded. Values and scales of a
    quantized kernel share one spec: a mesh divides its input axis by whole tiles.

    Args:
      params: the base's tree, of arrays or ShapeDtypeStructs.
      rules: ((regular expression, PartitionSpec), ...).
      mesh: of `make_mesh`.

    Returns:
      A tree of NamedSharding like `params`.

    Raises:
      InputError: a path matches no rule.
    """

    def sharding(path: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.fullmatch(pattern, path):
                return NamedSharding(mesh, _fit(cut_shape(leaf), spec, mesh))
        raise InputError(f"no sharding rule matches {path}; end them with ('.*', P())")

    flat = paths.flatten(params)
    return paths.unflatten({path: sharding(path, leaf) for path, leaf in flat.items()})


def constrain(tree: Any, rules: Sequence[tuple[str, PartitionSpec]], mesh: Mesh) -> Any:
    """Return arrays of a compiled program with their shardings of `param_shardings`."""
    shardings = param_shardings(tree, rules, mesh)
    return jax.lax.with_sharding_constraint(tree, shardings)


def adapter_shardings(
    kernel: KernelSpec, sharding: NamedSharding
) -> tuple[Adapter, Directions]:
    """Return the shardings beside a kernel, derived from the kernel's own.

    A and L take its input axis, B, R and DoRA's m its output axis, all of them its
    batch axes; rank and direction axes are not sharded.

    Args:
      kernel: description of the kernel.
      sharding: sharding of the stored kernel.

    Returns:
      An Adapter and a Directions whose leaves are NamedShardings.
    """
    axes = KernelAxes.of_kernel(kernel, sharding)
    return leaves_beside(kernel, axes.sharding)


def full_sharding(spec: FullSpec, sharding: NamedSharding) -> FullParam:
    """Return a full parameter's sharding: the base's, with the axis of rows unsharded.

    Args:
      spec: description of the full parameter.
      sharding: sharding of the base's parameter.
    """
    axes = [*sharding.spec, *(None,) * (len(spec.shape) - len(sharding.spec))]
    if spec.rows is not None:
        axes[spec.axis] = None
    return FullParam(NamedSharding(sharding.mesh, PartitionSpec(*axes)), spec)


def state_shardings(
    state: TrainState, spec: Spec, params: Mapping[str, Any], mesh: Mesh
) -> TrainState:
    """Return the shardings of a state; moments are sharded as their parameters.

    Args:
      state: of `create_state`, abstract (`jax.eval_shape`) or of arrays.
      spec: of `make_spec`.
      params: shardings of the base, of `param_shardings`.
      mesh: of `make_mesh`.
    """
    kernels = paths.select(params, spec.paths)
    pairs = {k.path: adapter_shardings(k, kernels[k.path]) for k in spec.kernels}
    bases = paths.select(params, tuple(each.path for each in spec.full))
    trainable = Trainable(
        adapters={path: pair[0] for path, pair in pairs.items()},
        full={p.path: full_sharding(p, bases[p.path]) for p in spec.full},
    )
    replicated = NamedSharding(mesh, PartitionSpec())

    return TrainState(
        step=replicated,
        launched=replicated,
        trainable=trainable,
        directions={path: pair[1] for path, pair in pairs.items()},
        opt_state=_moment_shardings(state.opt_state, trainable, replicated),
        monitor=jax.tree.map(lambda _: replicated, state.monitor),
    )


def _moment_shardings(
    opt_state: optax.OptState, trainable: Trainable, others: NamedSharding
) -> Any:
    """Return every moment's sharding, its parameter's, and `others` for all else."""

    def at(moment: Any, sharding: NamedSharding) -> Any:
        return moment if _is_masked(moment) else sharding  # of another group

    def node(each: Any) -> Any:
        if not isinstance(each, Trainable):
            return others
        return jax.tree.map(at, each, trainable, is_leaf=_is_masked)

    def is_trainable(each: Any) -> bool:
        return isinstance(each, Trainable)

    return jax.tree.map(node, opt_state, is_leaf=is_trainable)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def check_batch(examples: int, mesh: Mesh) -> None:
    """Raise InputError unless a micro-batch divides over the mesh's data axes.

    Args:
      examples: number of examples of a micro-batch.
      mesh: of `make_mesh`.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if examples % ways:
        raise InputError(
            f"a micro-batch of {examples} examples does not divide over the mesh's "
            f"data x fsdp = {ways} ways; use a multiple of {ways}"
        )


def place_batch(
    batch: Mapping[str, Any], mesh: Mesh, spec: PartitionSpec = BATCH
) -> dict:
    """Return a batch on the devices of the mesh.

    Every process passes the same whole batch, and keeps the share of its devices, so
    that a mesh may span processes in any way.

    Args:
      batch: {name: array (micro-batches, examples, positions)}.
      mesh: of `make_mesh`.
      spec: mesh axes of the arrays.
    """
    sharding = NamedSharding(mesh, spec)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
        for name, array in batch.items()
    }
