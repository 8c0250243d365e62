"""Every call of an NNX method, seen from outside: its parameters, inputs, outputs.

A module that holds an adapted kernel becomes an instance of a subclass of its own
class, made here, whose methods are the class's own with something around them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from tsd_jax.binding.bound import SUFFIX, Bound
from tsd_jax.binding.calls import (
    Call,
    Handler,
    add_adapters,
    find_handler,
    method_name,
    named_arguments,
)
from tsd_jax.binding.marks import recorder
from tsd_jax.core.errors import InputError

SOURCES = "_tsd_candidates"


def variables(model: nnx.Module) -> dict[str, nnx.Param]:
    """Return {"/"-joined path: parameter}; a shared one once, at its first path.

    Args:
      model: the model.
    """
    if not isinstance(model, nnx.Module):
        raise InputError(
            f"{type(model).__name__} is no NNX model: for one of Linen use "
            "tsd_jax.make_spec(model.apply, variables, ...)"
        )
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param, graph=True))
    return {"/".join(map(str, path)): leaf for path, leaf in flat}


def read(module: nnx.Module, name: str) -> jax.Array:
    """Return the value of a parameter.

    Args:
      module: the module.
      name: attribute that holds the parameter.
    """
    return getattr(module, name).get_value()


def bound_beside(module: nnx.Module) -> dict[str, Bound]:
    """Return {kernel: its adapter} of a module.

    Args:
      module: the module.
    """
    return {
        name.removesuffix(SUFFIX): leaf.get_value()
        for name, leaf in vars(module).items()
        if name.endswith(SUFFIX) and isinstance(leaf, nnx.Variable)
    }


def candidates_of(module: nnx.Module) -> dict[str, int]:
    """Return {parameter: number of the candidate} of a module, during a trace.

    Args:
      module: the module.
    """
    number, *pairs = getattr(module, SOURCES, (None,))
    trace = recorder()
    return dict(pairs) if trace is not None and trace.number == number else {}


def owners(
    model: nnx.Module, wanted: Mapping[int, Any]
) -> Iterator[tuple[nnx.Module, dict[str, Any]]]:
    """Yield (module, {attribute: what is wanted of it}) of modules that hold variables.

    Args:
      model: the model.
      wanted: {id of a variable: anything}.
    """
    for _, module in list(nnx.iter_modules(model, graph=True)):
        held = vars(module).items()
        found = {name: wanted[id(v)] for name, v in held if id(v) in wanted}
        if found:
            yield module, found


def see_calls(module: nnx.Module, handlers: Mapping[type[nnx.Module], Handler]) -> None:
    """Make a module an instance of the subclass whose calls are seen.

    Args:
      module: a copy; it is changed.
      handlers: {module class: handler}.
    """
    seen = _subclass(type(module), tuple(handlers.items()))
    object.__setattr__(module, "__class__", seen)


@functools.cache
def _subclass(base: type[nnx.Module], handlers: tuple) -> type[nnx.Module]:
    """Make the subclass of a module's class whose calls are seen."""
    known = {kind for kind in base.__mro__ if kind in nnx.Module.__mro__}
    own = [kind for kind in reversed(base.__mro__) if kind not in known]
    names: dict[str, Any] = {}
    for kind in own:
        names |= vars(kind)
    methods = {
        name: _seen(attribute, dict(handlers))
        for name, attribute in names.items()
        if _is_method(name, attribute)
    }
    facts = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), {**methods, **facts})


def _is_method(name: str, attribute: Any) -> bool:
    if name.startswith("__") and name != "__call__":
        return False
    other = isinstance(attribute, staticmethod | classmethod | property | type)
    return callable(attribute) and hasattr(attribute, "__get__") and not other


def is_leaf(node: Any) -> bool:
    """Return whether a node of a call's arguments is a module or variable.

    Args:
      node: of a tree.
    """
    return isinstance(node, nnx.Pytree | nnx.Variable)


def _seen(attribute: Any, handlers: Mapping[type[nnx.Module], Handler]) -> Callable:
    """Return a method that calls `attribute`, and records or adapts the call."""
    name = method_name(attribute)
    handler = find_handler(name, handlers)

    @functools.wraps(attribute)
    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        call = attribute.__get__(self, type(self))
        described = handler and functools.partial(handler, self)
        if recorder() is not None:
            return _recorded(self, name, call, described, args, kwargs)
        beside = bound_beside(self)
        y = call(*args, **kwargs)
        if not beside:
            return y
        arguments, _ = named_arguments(call, args, kwargs)
        told = described and functools.partial(described, *args, **kwargs)
        value = functools.partial(read, self)
        return add_adapters(beside, name, arguments, y, told, value, is_leaf)

    return method


def _recorded(
    module: nnx.Module,
    name: str,
    method: Callable,
    described: Callable[..., Call] | None,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Any:
    """Run one call of a method between marks."""
    candidates, trace = candidates_of(module), recorder()
    if trace is None or not candidates:
        return method(*args, **kwargs)
    arguments, unpack = named_arguments(method, args, kwargs)

    def call(arguments: dict[str, Any]) -> Any:
        args, kwargs = unpack(arguments)
        return method(*args, **kwargs)

    def claim(arguments: dict[str, Any]) -> tuple[int, Call] | None:
        args, kwargs = unpack(arguments)
        told = described(*args, **kwargs) if described else None
        source = candidates.get(told.kernel) if told else None
        return None if told is None or source is None else (source, told)

    owned = {source: read(module, name) for name, source in candidates.items()}
    where = type(module).__name__
    return trace.run(name, where, owned, arguments, call, claim, is_leaf)
