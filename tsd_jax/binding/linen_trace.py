"""Read every kernel's layout from one abstract trace of the model.

A shape does not tell the axes apart: (4, 4, 4) is `DenseGeneral((4, 4))`,
`DenseGeneral(4, axis=(-2, -1))` and a scanned `Dense` alike. So a probe lies beside
each candidate kernel; lifted transforms tell it which axis they take away (Flax's
`AxisMetadata` protocol), and the module that owns the kernel tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

from tsd_jax.binding.linen_handlers import Call, Handler, find_handler
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout

PROBE = "_tsd_probe"


class Probe(struct.PyTreeNode, meta.AxisMetadata):
    """Follow a stored array through lifted transforms.

    Attributes:
      value: stands in for the kernel.
      path: of the kernel. axes: the stored axes still visible, in order.
    """

    value: Any
    path: str = struct.field(pytree_node=False)
    axes: tuple[int, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """Give what stands in for the kernel."""
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


def _layout(probe: Probe, ndim: int, roles: tuple[tuple[int, ...], ...]) -> Layout:
    """Translate a module's view of its kernel to the stored axes."""
    batch, inputs, outputs = (tuple(probe.axes[axis] for axis in r) for r in roles)
    lifted = tuple(axis for axis in range(ndim) if axis not in probe.axes)
    return Layout(tuple(sorted((*lifted, *batch))), inputs, outputs, lifted)


def _abstract_call(apply_fn: Callable, variables: Any, args: tuple, kwargs: dict):
    """Trace a call with arrays abstract and everything else as it is."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape")}

    def call(variables: Any, arrays: dict[int, Any]):
        full = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, full)
        return apply_fn(variables, *args, **kwargs)

    jax.eval_shape(call, variables, arrays)


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
    probes = {
        path + PROBE: Probe(
            jax.ShapeDtypeStruct(shape, kernels[path].dtype),
            path,
            tuple(range(len(shape))),
        )
        for path, shape in shapes.items()
    }
    layouts: dict[str, Layout] = {}
    owners: dict[str, str] = {}

    def record(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and module.scope is not None:
            owners["/".join(module.path)] = type(module).__name__
            handler = find_handler(module, handlers)
            call = handler(module, *args, **kwargs) if handler else None
            if call and module.has_variable("params", call.kernel + PROBE):
                probe = module.get_variable("params", call.kernel + PROBE)
                _note(layouts, probe, shapes[probe.path], call)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        tree = {**variables, "params": paths.update(variables["params"], probes)}
        _abstract_call(apply_fn, tree, args, kwargs)
    return layouts, owners


def _note(
    layouts: dict[str, Layout], probe: Probe, shape: tuple[int, ...], call: Call
) -> None:
    """Note how one call uses its kernel; two calls must agree."""
    layout = _layout(probe, len(shape), call.contraction.axes())
    if layouts.setdefault(probe.path, layout) != layout:
        raise InputError(
            f"{probe.path} is ambiguous: one call contracts it as "
            f"{layouts[probe.path]}, another as {layout}; leave it out of the rules"
        )
