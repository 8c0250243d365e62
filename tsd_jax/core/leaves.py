"""The table of leaves: what every array beside a kernel is, declared on its field.

    b: Leaf = struct.field(metadata=leaf("rank", "out", group=FACTORS))

Shapes, shardings, optimizer groups, what launch starts anew and what a file holds are
all read from here; a new leaf is one such line, and its own mathematics.
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
"""What an axis counts; every leaf has the kernel's stacked axes before its own."""


@dataclass(frozen=True)
class Group:
    """What the optimizer treats alike: one learning rate, one fate at launch.

    Attributes:
      name: the label of its leaves in `optax.partition`.
      decays: whether weight decay applies.
      resets: whether a method's launch starts its moments again.
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
      axes: what its own axes count, names of `SIZES`.
      group: of the optimizer; None for what is frozen.
      exists: whether a kernel has it.
      renewed: whether a method's launch starts it anew; otherwise it goes on.
    """

    axes: tuple[str, ...]
    group: Group | None
    exists: Callable[[KernelSpec], Any]
    renewed: Callable[[Method], bool]

    def shape(self, kernel: KernelSpec) -> tuple[int, ...]:
        """Return the shape (*batch, ...) beside a kernel."""
        return (*kernel.batch_shape, *(SIZES[axis](kernel) for axis in self.axes))


def leaf(
    *axes: str,
    group: Group | None = None,
    exists: Callable[[KernelSpec], Any] = lambda kernel: True,
    renewed: Callable[[Method], bool] = lambda method: False,
) -> dict[str, LeafSpec]:
    """Return the metadata of a leaf's field; see `LeafSpec` for the arguments."""
    return {"leaf": LeafSpec(axes, group, exists, renewed)}


def leaf_specs(kind: Any) -> dict[str, LeafSpec]:
    """Return the table {field: LeafSpec} of a class declared by `leaf`."""
    fields = dataclasses.fields(kind)
    return {f.name: f.metadata["leaf"] for f in fields if "leaf" in f.metadata}


def map_leaves(
    kind: Any, kernel: KernelSpec, make: Callable[[LeafSpec], Any]
) -> dict[str, Any]:
    """Return {field: make(spec)}, with None for the leaves a kernel does not have."""
    return {
        name: make(spec) if spec.exists(kernel) else None
        for name, spec in leaf_specs(kind).items()
    }


def leaf_shapes(kind: Any, kernel: KernelSpec) -> dict[str, tuple[int, ...]]:
    """Return {field: shape} of the leaves that a kernel has."""
    shapes = map_leaves(kind, kernel, lambda spec: spec.shape(kernel))
    return {name: shape for name, shape in shapes.items() if shape is not None}


class KernelAxes(NamedTuple):
    """The mesh axes along which a kernel is cut, as its leaves see them.

    Attributes:
      mesh: of the devices. batch: mesh axes of every stacked axis.
      inputs: mesh axes of the flattened inputs. outputs: of the outputs.
    """

    mesh: Mesh
    batch: tuple[Any, ...]
    inputs: Any
    outputs: Any

    @classmethod
    def of_kernel(cls, kernel: KernelSpec, sharding: NamedSharding) -> KernelAxes:
        """Read them off the sharding of the stored kernel."""
        axes = (*sharding.spec, *(None,) * (len(kernel.shape) - len(sharding.spec)))

        def flattened(group: tuple[int, ...]) -> Any:
            # A flattened axis is sharded as its first part, if the others are whole.
            first, *others = (axes[axis] for axis in group)
            return first if not any(others) else None

        layout = kernel.layout
        batch = tuple(axes[axis] for axis in layout.batch)
        inputs, outputs = flattened(layout.inputs), flattened(layout.outputs)
        mesh: Any = sharding.mesh
        return cls(mesh, batch, inputs, outputs)

    def sharding(self, spec: LeafSpec) -> NamedSharding:
        """Return a leaf's sharding: cut along inputs and outputs as the kernel is."""
        cut = {"in": self.inputs, "out": self.outputs}
        own = (cut.get(axis) for axis in spec.axes)
        return NamedSharding(self.mesh, PartitionSpec(*self.batch, *own))
