"""How adapters meet a Flax NNX model: beside its kernels, in a copy of the model.

    model.q_proj: nnx.Linear   ->   bound.q_proj: a subclass of nnx.Linear
           └─ kernel                       ├─ kernel
                                           └─ kernel_tsd

Paths, adapters and directions are those of the Linen binding: a parameter's path is its
path in `nnx.state`, joined by "/". What lies beside a kernel is a variable of the
kernel's type, which `nnx.scan`, `nnx.vmap`, `nnx.remat` and `nnx.split` treat as the
kernel itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tsd_jax.binding.bound import SUFFIX, bound_leaves, unknown_calls
from tsd_jax.binding.calls import (
    Handler,
    find_handler,
    fits,
    method_name,
    other_class,
)
from tsd_jax.binding.check import Ways, compare, floats
from tsd_jax.binding.einsum import EinsumCall, run_einsum
from tsd_jax.binding.nnx.handlers import HANDLERS
from tsd_jax.binding.nnx.methods import (
    bound_beside,
    candidates_of,
    owners,
    read,
    see_calls,
    variables,
)
from tsd_jax.binding.nnx.trace import trace_calls
from tsd_jax.binding.spec import split_rules, traced_spec, with_arrays_apart
from tsd_jax.core import adapter as core
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, place_full
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import Rule, Spec

Model = TypeVar("Model", bound=nnx.Module)


def params(model: nnx.Module) -> dict[str, Any]:
    """Return the values of all `nnx.Param` as a nested dict, as `launch` takes it."""
    return paths.unflatten(
        {path: leaf.get_value() for path, leaf in variables(model).items()}
    )


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def make_spec(
    model: nnx.Module,
    rules: Sequence[Rule | Full],
    *args: Any,
    method: str | Method = "tsd",
    handlers: Mapping[type[nnx.Module], Handler] = HANDLERS,
    function: Callable = _forward,
    **kwargs: Any,
) -> Spec:
    """Choose what to adapt or train in full, from one abstract trace of the model.

    Nothing is computed, and the model is not changed: arrays may be
    ShapeDtypeStructs.

    Args:
      model: the model.
      rules: regular expressions over the "/"-joined paths of `nnx.state(model,
        nnx.Param)`; the first match wins.
      *args: what the model is called with, as arrays or ShapeDtypeStructs.
      method: "lora", "dash", "init", "tsd", or of `get_method`.
      handlers: what each module type contracts; extend `HANDLERS` for modules of
        your own.
      function: called as `function(model, *args, **kwargs)`; the model's call by
        default.
      **kwargs: likewise.

    Raises:
      InputError: a rule matches nothing; a matched kernel is used by no known module
        in that trace, or in two ways; rank or directions exceed the kernel; what shall
        train in full has no such rows.
    """
    known = {path: leaf.get_value() for path, leaf in variables(model).items()}
    odd = [path for path, leaf in known.items() if not hasattr(leaf, "shape")]
    if odd:
        raise InputError(
            f"{odd[0]} holds a {type(known[odd[0]]).__name__} and no plain array: load "
            "it in a float type"
        )
    matched, full = split_rules(known, rules)
    traced = trace_calls(model, tuple(matched), handlers, function, args, kwargs)
    shapes = {path: tuple(known[path].shape) for path in matched}
    return traced_spec(shapes, matched, traced, method, full)


def bind(
    model: Model,
    trainable: core.Trainable,
    directions: Mapping[str, core.Directions],
    dropout_key: jax.Array | None = None,
    handlers: Mapping[type[nnx.Module], Handler] = HANDLERS,
) -> Model:
    """Copy a model, with adapters beside its kernels: called as the model itself.

        y = x K + (x down) up,   never K + dK;   with DoRA c times that, but the bias

    The low-rank path runs in the adapters' type (float32) and is added before the
    sum is rounded to y's type. Call it inside the function that is differentiated
    or jitted.

    Args:
      model: not changed. Its arrays are the copy's, its variables are not: what a
        call changes (batch statistics, caches, counts) is found in the copy.
      trainable: what trains.
      directions: {kernel path: Directions}.
      dropout_key: a typed key; without one there is no dropout (evaluation).
      handlers: as given to `make_spec`.

    Raises:
      InputError: a kernel is not in the model.
    """
    core.check_pair(trainable, directions)
    base = paths.select(params(model), trainable.paths)
    full = trainable.full
    if full:
        values = {path: place_full(base[path], each) for path, each in full.items()}
        model = _with_values(model, values)
    leaves = bound_leaves(base, trainable.adapters, directions, dropout_key)
    copy = nnx.clone(model, graph=True)
    known = variables(copy)
    beside = {
        id(known[path]): (path, type(known[path])(leaf))
        for path, leaf in leaves.items()
    }
    placed: set[str] = set()
    for module, found in list(owners(copy, beside)):
        handler = find_handler(method_name(type(module).__call__), handlers)
        for name, (path, leaf) in found.items():
            setattr(module, name + SUFFIX, leaf)
            sites = leaves[path].sites
            if fits(sites, type(module)) if sites else handler:
                placed.add(path)
        see_calls(module, handlers)
    for path, leaf in leaves.items():
        if path not in placed:
            wrong = other_class(path, leaf.sites) if leaf.sites else None
            raise wrong or unknown_calls(path)
    return copy


def make_bind(
    model: Model, handlers: Mapping[type[nnx.Module], Handler] = HANDLERS
) -> Callable[..., Model]:
    """Return bind(params, trainable, directions, dropout_key=None) -> bound model.

    The binding a trainer is given: the parameters are an argument, a tree like
    `params(model)`, and may be traced, sharded or differentiated. All other state of
    the model is as it is now, in every call.

    Args:
      model: not changed.
      handlers: as given to `make_spec`.
    """

    def bind_params(
        params: Mapping[str, Any],
        trainable: core.Trainable,
        directions: Mapping[str, core.Directions],
        dropout_key: jax.Array | None = None,
    ) -> Model:
        base = _with_values(model, paths.flatten(params))
        return bind(base, trainable, directions, dropout_key, handlers)

    return bind_params


def _with_values(model: Model, values: Mapping[str, Any]) -> Model:
    """Copy a model, with other values at these paths."""
    copy = nnx.clone(model, graph=True)
    known = variables(copy)
    for path, value in values.items():
        known[path].set_value(value)
    return copy


def merge(
    model: Model,
    trainable: core.Trainable,
    directions: Mapping[str, core.Directions],
    dtype: jnp.dtype | None = None,
) -> Model:
    """Copy a model, with every dK added and every full parameter in place.

    Args:
      model: not changed.
      trainable: what trains.
      directions: {kernel path: Directions}.
      dtype: of the merged kernels; None keeps each kernel's own.

    Raises:
      InputError: a kernel is not in the model.
    """
    merged = core.merge(params(model), trainable, directions, dtype)
    return _with_values(model, paths.select(merged, trainable.paths))


def check(
    model: nnx.Module,
    spec: Spec,
    *args: Any,
    handlers: Mapping[type[nnx.Module], Handler] = HANDLERS,
    function: Callable = _forward,
    **kwargs: Any,
) -> None:
    """Check a spec on a model: random adapters, bound, do what they do merged.

    The first thing to do with a model of one's own. It takes four forward passes, and
    no training. With adapters that add nothing the model is to be the base.

    Args:
      model: not changed.
      spec: of `make_spec`.
      *args: what the model is called with.
      handlers: as given to `make_spec`.
      function: as given to `make_spec`.
      **kwargs: what the model is called with.

    Raises:
      InputError: outputs differ by more than rounding; the line names the kernel that
        does most of it.
    """
    graphdef, state = nnx.split(model, graph=True)
    given, inputs = with_arrays_apart(lambda *all: all, state, args, kwargs)

    def way(change: Callable) -> Callable[..., list[jax.Array]]:
        def run(inputs: Any, *pair: Any) -> list[jax.Array]:
            state, args, kwargs = given(inputs)
            changed = change(nnx.merge(graphdef, state), *pair)
            return floats(function(changed, *args, **kwargs))

        return run

    ways = Ways(
        base=way(lambda model: model),
        bound=way(functools.partial(bind, handlers=handlers)),
        merged=way(merge),
    )

    def base(inputs: Any) -> dict[str, Any]:
        return params(nnx.merge(graphdef, given(inputs)[0]))

    with jax.default_matmul_precision("highest"):
        compare(ways, inputs, base, spec, jax.random.key(0))


def einsum(
    module: nnx.Module,
    subscripts: str,
    x: jax.Array,
    kernel: str,
    *,
    dtype: Any = None,
    **settings: Any,
) -> jax.Array:
    """Contract x with a parameter of a module of your own, adapters included.

    As `tsd_jax.einsum` for Linen: called inside the module, in the place of
    `jnp.einsum`, with `kernel` the attribute that holds the `nnx.Param`.
    """
    return run_einsum(
        EinsumCall(subscripts, x, dtype, settings),
        functools.partial(read, module),
        kernel,
        type(module).__name__,
        candidates_of(module),
        bound_beside(module),
    )
