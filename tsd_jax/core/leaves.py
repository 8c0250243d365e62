"""The table of leaves: what every array beside a kernel is, declared on its field.

    b: Leaf = struct.field(metadata=leaf("rank", "out", group=FACTORS))

Shapes, shardings, optimizer groups, what launch renews and what a file holds are all
read from here, so that a new leaf needs one such line besides its own mathematics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core.methods import Method
from tsd_jax.core.spec import KernelSpec

SIZES: dict[str, Callable[[KernelSpec], int]] = {
    "in": lambda kernel: kernel.fan_in,
    "out": lambda kernel: kernel.fan_out,
    "rank": lambda kernel: kernel.rank,
    "gains": lambda kernel: kernel.gains,
    "columns": lambda kernel: kernel.columns,
    "spectrum": lambda kernel: min(kernel.fan_in, kernel.fan_out),
    "ranked": lambda kernel: kernel.ranked,
    "one": lambda kernel: 1,
}
"""The size of each named axis; a leaf has the kernel's batch axes before its own."""


@dataclass(frozen=True)
class Group:
    """Leaves that the optimizer treats alike.

    Attributes:
      name: label of the leaves in `optax.partition`.
      decays: whether weight decay applies.
      resets: method -> whether its launch resets the optimizer's moments.
    """

    name: str
    decays: bool
    resets: Callable[[Method], bool]


FACTORS = Group("lora", decays=True, resets=lambda method: method.restart)
GAINS = Group("gain", decays=False, resets=lambda method: method.gains)
FULL = Group("full", decays=True, resets=lambda method: False)
GROUPS = (FACTORS, GAINS, FULL)


@dataclass(frozen=True)
class LeafSpec:
    """The static description of one leaf.

    Attributes:
      axes: its own axes, keys of SIZES.
      group: its group in the optimizer; None where it is frozen.
      exists: kernel -> whether the kernel has it.
      renewed: method -> whether its launch replaces it.
    """

    axes: tuple[str, ...]
    group: Group | None
    exists: Callable[[KernelSpec], Any]
    renewed: Callable[[Method], bool]

    def shape(self, kernel: KernelSpec) -> tuple[int, ...]:
        """Return the shape (*batch, ...) beside a kernel.

        Args:
          kernel: the kernel's description.
        """
        return (*kernel.batch_shape, *(SIZES[axis](kernel) for axis in self.axes))


def leaf(
    *axes: str,
    group: Group | None = None,
    exists: Callable[[KernelSpec], Any] = lambda kernel: True,
    renewed: Callable[[Method], bool] = lambda method: False,
) -> dict[str, LeafSpec]:
    """Return the metadata of a leaf's field.

    Args:
      axes: see `LeafSpec`.
      group: see `LeafSpec`.
      exists: see `LeafSpec`.
      renewed: see `LeafSpec`.
    """
    return {"leaf": LeafSpec(axes, group, exists, renewed)}


def leaf_specs(kind: Any) -> dict[str, LeafSpec]:
    """Return {field: LeafSpec} of a class whose fields are declared with `leaf`.

    Args:
      kind: the class, or an instance of it.
    """
    fields = dataclasses.fields(kind)
    return {f.name: f.metadata["leaf"] for f in fields if "leaf" in f.metadata}


def map_leaves(
    kind: Any, kernel: KernelSpec, make: Callable[[LeafSpec], Any]
) -> dict[str, Any]:
    """Return {field: make(spec)}, with None for the leaves that a kernel lacks.

    Args:
      kind: a class whose fields are declared with `leaf`.
      kernel: the kernel's description.
      make: LeafSpec -> the leaf.
    """
    return {
        name: make(spec) if spec.exists(kernel) else None
        for name, spec in leaf_specs(kind).items()
    }


def leaf_shapes(kind: Any, kernel: KernelSpec) -> dict[str, tuple[int, ...]]:
    """Return {field: shape} of the leaves that a kernel has.

    Args:
      kind: a class whose fields are declared with `leaf`.
      kernel: the kernel's description.
    """
    shapes = map_leaves(kind, kernel, lambda spec: spec.shape(kernel))
    return {name: shape for name, shape in shapes.items() if shape is not None}


class KernelAxes(NamedTuple):
    """The mesh axes over which a kernel is sharded, as the leaves beside it need them.

    Attributes:
      mesh: mesh of the devices.
      batch: mesh axes of every batch axis.
      inputs: mesh axes of the flattened inputs.
      outputs: mesh axes of the flattened outputs.
    """

    mesh: Mesh
    batch: tuple[Any, ...]
    inputs: Any
    outputs: Any

    @classmethod
    def of_kernel(cls, kernel: KernelSpec, sharding: NamedSharding) -> KernelAxes:
        """Return the mesh axes of a stored kernel.

        Args:
          kernel: the kernel's description.
          sharding: sharding of the stored kernel.
        """
        axes = (*sharding.spec, *(None,) * (len(kernel.shape) - len(sharding.spec)))

        def flattened(group: tuple[int, ...]) -> Any:
            # Flattened axes are sharded like the first one if the others are not.
            first, *others = (axes[axis] for axis in group)
            return first if not any(others) else None

        layout = kernel.layout
        batch = tuple(axes[axis] for axis in layout.batch)
        inputs, outputs = flattened(layout.inputs), flattened(layout.outputs)
        mesh: Any = sharding.mesh
        return cls(mesh, batch, inputs, outputs)

    def sharding(self, spec: LeafSpec) -> NamedSharding:
        """Return a leaf's sharding: inputs and outputs are sharded as the kernel's.

        Args:
          spec: the leaf's description.
        """
        sharded = {"in": self.inputs, "out": self.outputs}
        own = (sharded.get(axis) for axis in spec.axes)
        return NamedSharding(self.mesh, PartitionSpec(*self.batch, *own))
