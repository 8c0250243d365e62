"""Every call of a Linen method, seen from outside: its parameters, inputs, outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import meta

from tsd_jax.binding.bound import SUFFIX, Bound, note_class
from tsd_jax.binding.calls import (
    Call,
    Handler,
    add_adapters,
    find_handler,
    method_name,
    named_arguments,
)
from tsd_jax.binding.marks import Recorder

TAG = "_tsd_candidate"


class Tag(struct.PyTreeNode):
    """What lies beside a candidate during a trace, for its module to know it by.

    Attributes:
      source: number of the candidate.
      recorder: number of the trace.
    """

    source: int = struct.field(pytree_node=False)
    recorder: int = struct.field(pytree_node=False)


def _beside(module: nn.Module, kind: type, suffix: str) -> dict[str, Any]:
    """Return {parameter: what lies beside it} in a module's own scope."""
    held = {} if module.scope is None else module.variables.get("params", {})
    return {
        name.removesuffix(suffix): leaf
        for name, leaf in held.items()
        if isinstance(leaf, kind)
    }


def bound_beside(module: nn.Module) -> dict[str, Bound]:
    """Return {kernel: its adapter} of a module's own scope.

    Args:
      module: the module, bound to its variables.
    """
    return _beside(module, Bound, SUFFIX)


def candidates_of(module: nn.Module) -> dict[str, int]:
    """Return {parameter: number of the candidate} of a module's own scope.

    Args:
      module: the module, bound to its variables.
    """
    return {name: tag.source for name, tag in _beside(module, Tag, TAG).items()}


def read(module: nn.Module, name: str) -> jax.Array:
    """Return a parameter as `module.param` gives it.

    Args:
      module: the module, bound to its variables.
      name: of the parameter.
    """
    return meta.unbox(module.get_variable("params", name))


def interceptor(
    recorder: Recorder | None, handlers: Mapping[type[nn.Module], Handler]
) -> Callable:
    """Return what `nn.intercept_methods` takes, to record calls or add adapters.

    Args:
      recorder: of the trace that is going on; None to add adapters.
      handlers: {module class: handler}.
    """

    def intercept(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        beside = candidates_of(module) if recorder else bound_beside(module)
        if not beside or context.method_name in ("setup", "<lambda>"):
            return next_fun(*args, **kwargs)
        method = method_name(context.orig_method)
        handler = find_handler(method, handlers)
        arguments, unpack = named_arguments(context.orig_method, args, kwargs)
        if recorder is None:
            note_class(beside, type(module))
            y = next_fun(*args, **kwargs)
            described = handler and functools.partial(handler, module, *args, **kwargs)
            value = functools.partial(read, module)
            return add_adapters(beside, method, arguments, y, described, value)

        def call(arguments: dict[str, Any]) -> Any:
            args, kwargs = unpack(arguments)
            return next_fun(*args, **kwargs)

        def claim(arguments: dict[str, Any]) -> tuple[int, Call] | None:
            if handler is None:
                return None
            args, kwargs = unpack(arguments)
            described = handler(module, *args, **kwargs)
            source = beside.get(described.kernel)
            return None if source is None else (source, described)

        owned = {source: read(module, name) for name, source in beside.items()}
        where = "/".join(module.path) or type(module).__name__
        return recorder.run(method, where, owned, arguments, call, claim)

    return intercept
