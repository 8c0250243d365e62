"""Read every kernel's layout from one abstract trace of the model.

A shape does not tell the axes apart: (4, 4, 4) is `DenseGeneral((4, 4))`,
`DenseGeneral(4, axis=(-2, -1))` and a scanned `Dense` alike. So a probe lies beside
each candidate kernel; lifted transforms tell it which axis they take away (Flax's
`AxisMetadata` protocol), and the module that owns the kernel tells the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

from tsd_jax.binding.calls import Call, Handler, find_handler
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout

PROBE = "_tsd_probe"


class Probe(struct.PyTreeNode, meta.AxisMetadata):
    """Follow a stored array through lifted transforms.

    Attributes:
      value: stands in for the kernel.
      path: of the kernel. axes: the stored axes still visible, in order.
      note: called with path, axes and call where a module contracts the kernel.
    """

    value: Any
    path: str = struct.field(pytree_node=False)
    axes: tuple[int, ...] = struct.field(pytree_node=False)
    note: Callable[[str, tuple[int, ...], Call], None] = struct.field(pytree_node=False)

    def __call__(self, call: Call, y: Any, owner: Any = None) -> Any:
        """Note how one call uses the kernel, and pass its output on."""
        del owner
        check_output(self.path, call, self.value.shape, y)
        self.note(self.path, self.axes, call)
        return y

    def unbox(self) -> Any:
        """Return what stands in for the kernel."""
        return self.value

    def replace_boxed(self, val: Any) -> Probe:
        """Follow another value from the same place."""
        return self.replace(value=val)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Probe:
        """Note that a transform takes an axis away on its way inwards."""
        del params
        index %= len(self.axes)
        return self.replace(axes=self.axes[:index] + self.axes[index + 1 :])

    def add_axis(self, index: int, params: dict[Any, Any]) -> Probe:
        """Keep the count of axes right on the way outwards."""
        del params
        missing = -1  # never read: probes only go inwards
        index %= len(self.axes) + 1
        return self.replace(axes=(*self.axes[:index], missing, *self.axes[index:]))


def check_output(path: str, call: Call, kernel: tuple[int, ...], y: Any) -> None:
    """Raise InputError unless a module returns what its handler says it contracts."""
    want = call.contraction.y_shape(call.x.shape, kernel)
    got = getattr(y, "shape", type(y).__name__)
    if got != want:
        raise InputError(
            f"{path}: its module returns {got}, but its handler "
            f"describes {call.subscripts!r} of shape {want}; a handler is for modules "
            "that return one contraction, others use this library's einsum"
        )


def note_layout(
    layouts: dict[str, Layout],
    shapes: Mapping[str, tuple[int, ...]],
    path: str,
    axes: tuple[int, ...],
    call: Call,
) -> None:
    """Note how one call uses its kernel; two calls must agree.

    Args:
      layouts: {path: layout}, added to.
      shapes: {path: stored shape}.
      path: of the kernel.
      axes: the stored axes its module sees, in the order in which it sees them.
      call: what the module does with it.

    Raises:
      InputError: an earlier call uses it in another way.
    """
    roles = (tuple(axes[n] for n in role) for role in call.contraction.axes())
    batch, inputs, outputs = roles
    lifted = tuple(axis for axis in range(len(shapes[path])) if axis not in axes)
    layout = Layout(tuple(sorted((*lifted, *batch))), inputs, outputs, lifted)
    if layouts.setdefault(path, layout) != layout:
        raise InputError(
            f"{path} is ambiguous: one call contracts it as {layouts[path]}, "
            f"another as {layout}; leave it out of the rules"
        )


def with_arrays_apart(
    function: Callable, *trees: Any
) -> tuple[Callable[[dict[int, Any]], Any], dict[int, Any]]:
    """Split a call into its arrays, to be traced, and everything else, as it is.

    Returns:
      (call, arrays): `call(arrays)` is `function(*trees)`.
    """
    leaves, tree = jax.tree.flatten(trees)
    arrays = {n: leaf for n, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def call(arrays: dict[int, Any]):
        full = [arrays.get(n, leaf) for n, leaf in enumerate(leaves)]
        return function(*jax.tree.unflatten(tree, full))

    return call, arrays


def trace_layouts(
    apply_fn: Callable,
    variables: Mapping[str, Any],
    candidates: tuple[str, ...],
    handlers: Mapping[type[nn.Module], Handler],
    args: tuple,
    kwargs: dict,
) -> tuple[dict[str, Layout], dict[str, str]]:
    """Run the model abstractly once and see who uses each candidate kernel.

    Args:
      apply_fn: a Linen model's `apply`.
      variables: its variables; arrays or ShapeDtypeStructs.
      candidates: paths in `params`.
      handlers: {module type: handler}.
      args: further arguments of the call. kwargs: likewise.

    Returns:
      {kernel path: layout} of the kernels that a handled module uses, and
      {module path: type name} of all modules called.

    Raises:
      InputError: a kernel is contracted in two different ways.
    """
    kernels = paths.select(variables["params"], candidates)
    shapes = {path: tuple(kernel.shape) for path, kernel in kernels.items()}
    layouts: dict[str, Layout] = {}
    owners: dict[str, str] = {}
    note = functools.partial(note_layout, layouts, shapes)
    probes = {
        path + PROBE: Probe(
            jax.ShapeDtypeStruct(shape, kernels[path].dtype),
            path,
            tuple(range(len(shape))),
            note,
        )
        for path, shape in shapes.items()
    }

    def record(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            owners["/".join(module.path)] = type(module).__name__
            handler = find_handler(module, handlers)
            call = handler(module, *args, **kwargs) if handler else None
            if call and module.has_variable("params", call.kernel + PROBE):
                module.get_variable("params", call.kernel + PROBE)(call, y)
        return y

    tree = {**variables, "params": paths.update(variables["params"], probes)}
    call, arrays = with_arrays_apart(
        lambda tree, args, kwargs: apply_fn(tree, *args, **kwargs), tree, args, kwargs
    )
    with nn.intercept_methods(record):
        jax.eval_shape(call, arrays)
    return layouts, owners
