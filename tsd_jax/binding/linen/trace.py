"""One abstract trace of a Linen model, which tells how it uses its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from tsd_jax.binding.calls import Handler
from tsd_jax.binding.linen.methods import TAG, Tag, interceptor
from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.sites import Traced
from tsd_jax.binding.spec import trace
from tsd_jax.core import paths


def trace_calls(
    apply_fn: Callable,
    variables: Mapping[str, Any],
    candidates: tuple[str, ...],
    handlers: Mapping[type[nn.Module], Handler],
    args: tuple,
    kwargs: dict,
) -> dict[str, Traced | None]:
    """Return {candidate: what the model does with it}, None where nothing.

    Args:
      apply_fn: a Linen model's `apply`.
      variables: its variables; arrays or ShapeDtypeStructs.
      candidates: paths in `params`.
      handlers: {module class: handler}.
      args: further arguments of the call.
      kwargs: further arguments of the call.

    Raises:
      InputError: a candidate is used in another way than by contractions.
    """
    flat = paths.flatten(variables["params"])
    arrays = {
        path: paths.unboxed(leaf)
        for path, leaf in flat.items()
        if path in candidates or not hasattr(leaf, "unbox")
    }

    def run(recorder: Recorder | None, values: dict[str, Any], rest: Any) -> Any:
        variables, args, kwargs = rest
        if recorder is None:
            return apply_fn(variables, *args, **kwargs)
        tags = {
            path + TAG: Tag(number, recorder.number)
            for number, path in enumerate(candidates)
        }
        params = paths.update(variables["params"], {**values, **tags})
        with nn.intercept_methods(interceptor(recorder, handlers)):
            return apply_fn({**variables, "params": params}, *args, **kwargs)

    return trace(arrays, candidates, run, (variables, args, kwargs))
