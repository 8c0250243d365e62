"""Read every kernel's layout from one abstract trace of an NNX model.

NNX modules hold their parameters as they are stored; who takes a stack of layers apart
(`nnx.scan`, `nnx.vmap`, `jax.lax.scan` over a split state) is told by the traced
program alone. So a probe of each candidate's shape lies beside it. The module that
contracts the kernel leaves a mark on the probe, whose axes are then followed through
the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx, struct

from tsd_jax.binding.calls import Call, Handler, find_handler
from tsd_jax.binding.jaxpr_axes import Origin, follow, mark
from tsd_jax.binding.linen.trace import check_output, note_layout, with_arrays_apart
from tsd_jax.binding.nnx.modules import attach, variables
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout


class Probe(struct.PyTreeNode):
    """Follow a parameter to the calls that contract it.

    Attributes:
      value: stands in for the parameter.
      path: of the parameter. note: takes path and call, gives the mark's number.
    """

    value: Any
    path: str = struct.field(pytree_node=False)
    note: Callable[[str, Call], int] = struct.field(pytree_node=False)

    def __call__(self, call: Call, y: Any, owner: Any) -> Any:
        """Mark the parameter where one call uses it, and pass its output on."""
        del owner
        check_output(self.path, call, self.value.shape, y)
        mark(self.value, self.note(self.path, call))
        return y


def _noted(notes: list[tuple[str, Call]], path: str, call: Call) -> int:
    notes.append((path, call))
    return len(notes) - 1


def _called(
    owners: dict[str, str], path: str, handler: Handler, module: nnx.Module, *args, **kw
) -> Call:
    """Note that a module is called."""
    owners[path] = type(module).__name__
    return handler(module, *args, **kw)


def trace_layouts(
    model: nnx.Module,
    candidates: tuple[str, ...],
    handlers: Mapping[type[nnx.Module], Handler],
    function: Callable,
    args: tuple,
    kwargs: dict,
) -> tuple[dict[str, Layout], dict[str, str]]:
    """Run the model abstractly once and see who uses each candidate kernel.

    Args:
      model: not changed; arrays or ShapeDtypeStructs.
      candidates: paths of parameters.
      handlers: {module type: handler}.
      function: called as `function(model, *args, **kwargs)`.
      args: further arguments of the call. kwargs: likewise.

    Returns:
      {kernel path: layout} of the kernels in use, and {module path: type name} of
      all modules without a handler and those with one that were called.

    Raises:
      InputError: a kernel is contracted in two different ways, or its axes are
        changed on the way to its module.
    """
    known = variables(model)
    shapes = {path: tuple(known[path].shape) for path in candidates}
    standing = [
        jax.ShapeDtypeStruct(shape, known[path].dtype) for path, shape in shapes.items()
    ]
    notes: list[tuple[str, Call]] = []
    owners = _unhandled(model, handlers)
    graphdef, state = nnx.split(model, graph=True)

    def handler_of(path: str, module: nnx.Module) -> Handler | None:
        handler = find_handler(module, handlers)
        return handler and functools.partial(_called, owners, path, handler)

    def run(standing: list, state: Any, args: tuple, kwargs: dict) -> None:
        note = functools.partial(_noted, notes)
        values = zip(shapes, standing, strict=True)
        probes = {path: Probe(value, path, note) for path, value in values}
        copy = attach(nnx.merge(graphdef, state), probes, handler_of)
        function(copy, *args, **kwargs)

    call, arrays = with_arrays_apart(run, standing, state, args, kwargs)
    return _layouts(jax.make_jaxpr(call)(arrays).jaxpr, shapes, notes), owners


def _unhandled(model: nnx.Module, handlers: Mapping) -> dict[str, str]:
    return {
        "/".join(map(str, path)): type(module).__name__
        for path, module in nnx.iter_modules(model, graph=True)
        if find_handler(module, handlers) is None
    }


def _layouts(
    program: Any, shapes: Mapping[str, tuple[int, ...]], notes: list[tuple[str, Call]]
) -> dict[str, Layout]:
    """Follow the program's first inputs, of these shapes, to the marks on them."""
    layouts: dict[str, Layout] = {}

    def found(number: int, origin: Origin | None) -> None:
        path, call = notes[number]
        if origin is None or origin.shape != tuple(
            shapes[path][axis] for axis in origin.axes
        ):
            raise InputError(
                f"{path}: the program changes the kernel's axes before its module "
                "uses it, more than by taking stacked ones away; leave it out of the "
                "rules"
            )
        note_layout(layouts, shapes, path, origin.axes, call)

    sources: list[Origin | None] = [
        Origin(n, tuple(range(len(shape))), shape)
        for n, shape in enumerate(shapes.values())
    ]
    rest = [None] * (len(program.invars) - len(sources))
    follow(program, [*sources, *rest], found)
    return layouts
