"""Put things beside the kernels of an NNX model, where its modules see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from tsd_jax.binding.bound import SUFFIX
from tsd_jax.binding.calls import Call, Handler, Owner
from tsd_jax.core.errors import InputError


def variables(model: nnx.Module) -> dict[str, nnx.Param]:
    """Return {"/"-joined path: parameter}; a shared one once, at its first path."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param, graph=True))
    return {"/".join(map(str, path)): leaf for path, leaf in flat}


def owner(module: nnx.Module) -> Owner:
    """Describe a module to what lies beside its kernels."""
    own = {
        name: value.get_value()
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param) and not name.endswith(SUFFIX)
    }
    return Owner("", type(module).__name__, own)


def met(module: nnx.Module, call: Call, y: Any, owner: Owner) -> Any:
    """Show a call to what lies beside its kernel, bound leaf or probe."""
    beside = getattr(module, call.kernel + SUFFIX, None)
    return y if beside is None else beside.get_value()(call, y, owner)


class Adapted(nnx.Module):
    """Stand in for a module and show each of its calls to what lies beside its kernel.

    Attributes:
      base: the module; all other attributes are its own.
      handler: what it contracts.
    """

    def __init__(self, base: nnx.Module, handler: Handler):
        self.base = base
        self.handler = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, and add what its adapter adds."""
        y = self.base(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        call = self.handler(self.base, *args, **kwargs)
        return met(self.base, call, y, owner(self.base))

    def __getattr__(self, name: str) -> Any:
        """Look attributes of the module up in it."""
        if name.startswith("_") or name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)


def attach(
    model: nnx.Module,
    leaves: Mapping[str, Any],
    handler_of: Callable[[str, nnx.Module], Handler | None],
) -> nnx.Module:
    """Copy a model, with leaves beside its parameters and the owners' calls shown.

    A leaf is a variable of the kernel's own type, so that whatever a transform does
    with the kernel (filters, axes) it does with the leaf.

    Args:
      model: not changed; the copy has variables of its own.
      leaves: {parameter path: leaf}; a leaf is called with a `Call` and its output.
      handler_of: gives a module's handler from its path and itself; None if its
        calls are not shown.

    Raises:
      InputError: the owner lies where no other module can be put.
    """
    copy = nnx.clone(model, graph=True)
    beside = {
        id(variable): type(variable)(leaves[path])
        for path, variable in variables(copy).items()
        if path in leaves
    }

    def shown(path: tuple, node: Any) -> Any:
        own = vars(node) if isinstance(node, nnx.Module) else {}
        found = {name: beside.get(id(value)) for name, value in own.items()}
        found = {name: leaf for name, leaf in found.items() if leaf is not None}
        for name, leaf in found.items():
            setattr(node, name + SUFFIX, leaf)
        handler = handler_of("/".join(map(str, path)), node) if found else None
        return Adapted(node, handler) if handler else node

    return _replaced(copy, shown)


def _replaced(model: nnx.Module, shown: Callable[[tuple, Any], Any]) -> nnx.Module:
    try:
        return nnx.recursive_map(shown, model, graph=True)
    except ValueError as error:  # of a tuple, or of a module inside itself
        raise InputError(
            f"no module of this model can be replaced: {error}; hold modules in "
            "attributes, nnx.List or nnx.Dict"
        ) from None
