"""One abstract trace of an NNX model, which tells how it uses its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from tsd_jax.binding.calls import Handler
from tsd_jax.binding.follow import primitives
from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.nnx.methods import SOURCES, owners, see_calls, variables
from tsd_jax.binding.sites import Traced
from tsd_jax.binding.spec import trace, with_arrays_apart
from tsd_jax.core.errors import InputError


def trace_calls(
    model: nnx.Module,
    candidates: tuple[str, ...],
    handlers: Mapping[type[nnx.Module], Handler],
    function: Callable,
    args: tuple,
    kwargs: dict,
) -> dict[str, Traced | None]:
    """Return {candidate: what the model does with it}, None where nothing.

    Args:
      model: not changed; arrays or ShapeDtypeStructs.
      candidates: paths of parameters.
      handlers: {module class: handler}.
      function: called as `function(model, *args, **kwargs)`.
      args: further arguments of the call.
      kwargs: further arguments of the call.

    Raises:
      InputError: a candidate is used in another way than by contractions.
    """
    graphdef, state = nnx.split(model, graph=True)

    def run(recorder: Recorder | None, values: dict[str, Any], rest: Any) -> Any:
        state, args, kwargs = rest
        copy = nnx.merge(graphdef, state)
        if recorder is None:
            return function(copy, *args, **kwargs)
        known = variables(copy)
        for path, value in values.items():
            known[path].set_value(value)
        numbers = {id(known[path]): n for n, path in enumerate(candidates)}
        for module, found in owners(copy, numbers):
            setattr(module, SOURCES, (recorder.number, *found.items()))
            see_calls(module, handlers)
        return function(copy, *args, **kwargs)

    _check_classes(graphdef, (state, args, kwargs), candidates, handlers, function)
    arrays = {path: leaf.get_value() for path, leaf in variables(model).items()}
    return trace(arrays, candidates, run, (state, args, kwargs))


def _check_classes(
    graphdef: nnx.GraphDef,
    arguments: tuple[Any, tuple, dict],
    candidates: tuple[str, ...],
    handlers: Mapping[type[nnx.Module], Handler],
    function: Callable,
) -> None:
    """Refuse a model that does something else where a module is of a subclass."""
    kinds: set[str] = set()

    def run(seen: bool, state: Any, args: tuple, kwargs: dict) -> list[Any]:
        copy = nnx.merge(graphdef, state)
        known = variables(copy)
        wanted = {id(known[path]): path for path in candidates}
        for module, _ in list(owners(copy, wanted)) if seen else ():
            kinds.add(type(module).__name__)
            see_calls(module, handlers)
        outputs = jax.tree.leaves(function(copy, *args, **kwargs))
        return [leaf for leaf in outputs if isinstance(leaf, jax.Array)]

    programs = []
    for seen in (False, True):
        call, arrays = with_arrays_apart(functools.partial(run, seen), *arguments)
        programs.append(primitives(jax.make_jaxpr(call)(arrays).jaxpr))
    if programs[0] != programs[1]:
        raise InputError(
            f"the model does something else where a {' or '.join(sorted(kinds))} is of "
            "a subclass of its class, as bound modules are: let it ask isinstance(...) "
            "and not type(...)"
        )
