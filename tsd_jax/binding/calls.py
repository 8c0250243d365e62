"""One call of a method that contracts a kernel, as the trace or a handler tells it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from tsd_jax.binding.contraction import Contraction
from tsd_jax.core.errors import InputError

EINSUM = "tsd_jax.einsum"
"""The name of this library's einsum, where methods have theirs."""


class Call(NamedTuple):
    """Describe one call of a linear module.

    Attributes:
      kernel: name of the parameter.
      x: the input it is contracted with.
      subscripts: the contraction "x,kernel->y" as for `jnp.einsum`.
      bias: name of the parameter that is added to the contraction, with the axes of y
        that the kernel has; DoRA needs to know it. None where there is none.
    """

    kernel: str
    x: jax.Array
    subscripts: str
    bias: str | None = None

    @property
    def contraction(self) -> Contraction:
        """The labels of the three arrays."""
        return Contraction.parse(self.subscripts, self.x.ndim)


Handler = Callable[..., Call]
"""(module, *args, **kwargs of its call) -> what that call contracts."""


class Site(NamedTuple):
    """What every call of one method does with a kernel; static.

    Attributes:
      method: as `method_name` gives it.
      argument: key path of the input. output: key path of the output.
      subscripts: the contraction, every axis named.
      bias: name of the parameter beside the kernel that is added.
      more: whether anything but that is added.
    """

    method: str
    argument: str
    output: str
    subscripts: str
    bias: str | None = None
    more: bool = False


def find_handler(method: str, handlers: Mapping[Any, Handler]) -> Handler | None:
    """Look up the handler of the class whose `__call__` a method is."""
    for kind, handler in handlers.items():
        if method_name(kind.__call__) == method:
            return handler
    return None


def method_name(method: Any) -> str:
    """Return a name that tells a method from those it overrides."""
    while isinstance(method, functools.partial):
        method = method.func
    method = inspect.unwrap(method)
    name = getattr(method, "__qualname__", type(method).__name__)
    return f"{getattr(method, '__module__', '')}.{name}"


def named_arguments(
    method: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], tuple[tuple, dict]]]:
    """Return a call's arguments by name, however they were passed.

    Args:
      method: a function of the arguments; bound to its module.
      args: of the call.
      kwargs: of the call.

    Returns:
      ({name: value}, from such a dict back to args and kwargs).
    """
    try:
        bound = inspect.signature(method).bind(*args, **kwargs)
    except (TypeError, ValueError):
        tree = {"args": args, "kwargs": dict(kwargs)}
        return tree, lambda tree: (tree["args"], tree["kwargs"])

    def unpack(tree: dict[str, Any]) -> tuple[tuple, dict]:
        bound.arguments.update(tree)
        return bound.args, bound.kwargs

    return dict(bound.arguments), unpack


def replaced(
    tree: Any, key: str, change: Callable[[Any], Any], is_leaf: Any = None
) -> Any:
    """Return a tree with the leaf at a key path changed.

    Args:
      tree: of arrays.
      key: path of the leaf.
      change: what is done to it.
      is_leaf: what is not to be opened.

    Raises:
      InputError: the tree has no such leaf.
    """
    flat, structure = jax.tree.flatten_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(path) for path, _ in flat]
    if key not in names:
        raise InputError(
            f"a method that has an adapter returns no {key or 'single array'} here: "
            "make the spec from a call like this one"
        )
    leaves = [
        change(leaf) if name == key else leaf
        for name, (_, leaf) in zip(names, flat, strict=True)
    ]
    return structure.unflatten(leaves)


@functools.cache
def _methods(kind: type) -> frozenset[str]:
    """Name all methods of a class and of those it derives from."""
    held = (each for base in kind.__mro__ for each in vars(base).values())
    return frozenset(method_name(each) for each in held if callable(each))


def fits(sites: tuple[Site, ...], kind: type) -> bool:
    """Return whether a class has a method that a trace saw use a kernel.

    Args:
      sites: what the trace told; () for nothing.
      kind: the class.
    """
    methods = {site.method for site in sites}
    return not methods or bool(methods & {EINSUM, *_methods(kind)})


def other_class(path: str, sites: tuple[Site, ...]) -> InputError:
    """Return the error for an adapter whose kernel lies in a module of another class.

    Args:
      path: of the kernel.
      sites: what the trace of `make_spec` told.
    """
    return InputError(
        f"{path}: its adapter was made for {sites[0].method}, which no module here "
        "has: make the spec from this model, and read adapters of another with "
        "load_adapter(file, spec)"
    )


def add_adapters(
    beside: Mapping[str, Any],
    method: str,
    arguments: Any,
    y: Any,
    described: Callable[[], Call] | None,
    read: Callable[[str], jax.Array],
    is_leaf: Any = None,
) -> Any:
    """Return the outputs of one call of a method with all that is added to them.

    Args:
      beside: {kernel: what lies beside it} of the method's module.
      method: name of the method.
      arguments: of the call, by name.
      y: its outputs.
      described: asks the method's handler, where it has one.
      read: name -> parameter of the module.
      is_leaf: what in arguments and outputs is not to be opened.
    """
    for name, bound in beside.items():
        calls = calls_of(name, bound.sites, method, arguments, described, is_leaf)
        for site, call in calls:
            add = functools.partial(bound, call, read=read)
            y = replaced(y, site.output, add, is_leaf)
    return y


def _pick(tree: Any, key: str, is_leaf: Any) -> Any:
    """Return the leaf of a tree at a key path, or None."""
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
        if jax.tree_util.keystr(path) == key:
            return leaf
    return None


def calls_of(
    name: str,
    sites: tuple[Site, ...],
    method: str,
    arguments: Any,
    described: Callable[[], Call] | None,
    is_leaf: Any = None,
) -> list[tuple[Site, Call]]:
    """Describe what one call of a method contracts with a kernel.

    Args:
      name: of the kernel.
      sites: what the trace of `make_spec` told; () for nothing.
      method: name of the method.
      arguments: of its call, by name.
      described: asks the method's handler, where it has one.
      is_leaf: what in the arguments is not to be opened.

    Raises:
      InputError: the call is not like those that were traced.
    """
    mine = [site for site in sites if site.method == method]
    if described and (mine or not sites):
        call = described()
        if call.kernel == name:
            site = mine[0] if mine else Site(method, "", "", call.subscripts, call.bias)
            return [(site, call._replace(bias=site.bias))]
    calls = {}
    for site in mine:
        x = _pick(arguments, site.argument, is_leaf)
        place = (site.argument, site.output)
        if x is not None and x.ndim == site.subscripts.index(","):
            calls[place] = (site, Call(name, x, site.subscripts, site.bias))
    if len(calls) < len({(site.argument, site.output) for site in mine}):
        known = ", ".join(sorted({site.subscripts for site in mine}))
        raise InputError(
            f"{method} is called in another way than where the spec was made (input "
            f"{mine[0].argument} of {known}): make the spec from a call like this one"
        )
    return list(calls.values())
