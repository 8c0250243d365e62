"""One abstract trace of an NNX model, which tells how it uses its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from tsd_jax.binding.calls import Handler
from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.nnx.methods import SOURCES, owners, see_calls, variables
from tsd_jax.binding.sites import Traced
from tsd_jax.binding.spec import trace


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

    def run(recorder: Recorder, values: dict[str, Any], rest: Any) -> Any:
        state, args, kwargs = rest
        copy = nnx.merge(graphdef, state)
        known = variables(copy)
        for path, value in values.items():
            known[path].set_value(value)
        numbers = {id(known[path]): n for n, path in enumerate(candidates)}
        for module, found in owners(copy, numbers):
            setattr(module, SOURCES, (recorder.number, *found.items()))
            see_calls(module, handlers)
        return function(copy, *args, **kwargs)

    arrays = {path: leaf.get_value() for path, leaf in variables(model).items()}
    return trace(arrays, candidates, run, (state, args, kwargs))
