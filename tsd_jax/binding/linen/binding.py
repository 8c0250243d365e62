"""How adapters meet a Flax Linen model: beside its kernels, by interception.

    {"q_proj": {"kernel": K}}   ->   {"q_proj": {"kernel": K, "kernel_tsd": Bound}}

The model is not changed. Bound leaves lie in the `params` collection, so `nn.scan`
slices them, `nn.remat` recomputes with them, and shardings hold for them as for any
other parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from tsd_jax.binding.bound import SUFFIX, Guarded, adapters_seen, bound_leaves
from tsd_jax.binding.calls import Handler
from tsd_jax.binding.check import Ways, compare, floats
from tsd_jax.binding.einsum import EinsumCall, run_einsum
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.binding.linen.methods import (
    bound_beside,
    candidates_of,
    interceptor,
    read,
)
from tsd_jax.binding.linen.trace import trace_calls
from tsd_jax.binding.spec import split_rules, traced_spec, with_arrays_apart
from tsd_jax.core import paths
from tsd_jax.core.adapter import Directions, Trainable, check_pair, merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, place_full
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import Rule, Spec


def make_spec(
    apply_fn: Callable,
    variables: Mapping[str, Any],
    rules: Sequence[Rule | Full],
    *args: Any,
    method: str | Method = "tsd",
    handlers: Mapping[type[nn.Module], Handler] = HANDLERS,
    **kwargs: Any,
) -> Spec:
    """Choose what to adapt or train in full, from one abstract trace of the model.

    Nothing is computed: arrays may be ShapeDtypeStructs.

    Args:
      apply_fn: the model's `apply`; called as `apply_fn(variables, *args, **kwargs)`.
      variables: {"params": ..., other collections}.
      rules: regular expressions over "/"-joined paths in `params`; the first match
        wins.
      *args: what the model is called with, as arrays or ShapeDtypeStructs.
      method: "lora", "dash", "init", "tsd", or of `get_method`.
      handlers: what each module type contracts; extend `HANDLERS` for modules of
        your own.
      **kwargs: likewise.

    Raises:
      InputError: a rule matches nothing; a matched kernel is used by no known module
        in that trace, or in two ways; rank or directions exceed the kernel; what shall
        train in full is quantized, or has no such rows.
    """
    _check_call(apply_fn, variables)
    params = _parameters(variables)
    matched, full = split_rules(params, rules)
    traced = trace_calls(apply_fn, variables, tuple(matched), handlers, args, kwargs)
    shapes = {path: tuple(params[path].shape) for path in matched}
    return traced_spec(shapes, matched, traced, method, full)


def _parameters(variables: Any) -> dict[str, Any]:
    """Return {path: parameter} without boxes."""
    flat = paths.flatten(variables["params"])
    return {path: paths.unboxed(leaf) for path, leaf in flat.items()}


def bind(
    params: Mapping[str, Any],
    trainable: Trainable,
    directions: Mapping[str, Directions],
    dropout_key: jax.Array | None = None,
) -> dict[str, Any]:
    """Put adapters beside kernels, and full parameters in place, for `adapted`.

    Args:
      params: the parameter tree; its other leaves are passed on untouched.
      trainable: what trains.
      directions: {kernel path: Directions}.
      dropout_key: a typed key; without one there is no dropout (evaluation).

    Returns:
      A new tree with one more leaf, `<kernel>_tsd`, beside every adapted kernel, and
      the trained value, in the base's type, where a parameter trains in full.
    """
    check_pair(trainable, directions)
    base = paths.select(params, trainable.paths)
    bound = bound_leaves(base, trainable.adapters, directions, dropout_key)
    leaves: dict[str, Any] = {path + SUFFIX: leaf for path, leaf in bound.items()}
    stored = paths.flatten(params)
    leaves |= {path: Guarded(stored[path]) for path in trainable.adapters}
    full = trainable.full
    values = {path: place_full(base[path], each) for path, each in full.items()}
    return paths.update(params, {**leaves, **values})


def bind_variables(
    params: Mapping[str, Any],
    trainable: Trainable,
    directions: Mapping[str, Directions],
    dropout_key: jax.Array | None = None,
) -> dict[str, Any]:
    """Return {"params": `bind(...)`}, what a Linen model's `apply` takes.

    The binding a trainer is given for Linen models; the arguments are `bind`'s.
    """
    return {"params": bind(params, trainable, directions, dropout_key)}


def adapted(
    apply_fn: Callable, handlers: Mapping[type[nn.Module], Handler] = HANDLERS
) -> Callable:
    """Let a Linen `apply` see the adapters bound beside its kernels.

        y = x K + (x down) up,   never K + dK;   with DoRA c times that, but the bias

    The low-rank path runs in the adapters' type (float32) and is added before the
    sum is rounded to y's type. Same signature, and the same function where nothing
    is bound.

    Args:
      apply_fn: a Linen model's `apply`.
      handlers: as given to `make_spec`.
    """
    _check_call(apply_fn, {"params": {}})
    add_low_rank = interceptor(None, handlers)

    @functools.wraps(apply_fn)
    def adapted_apply(variables, *args, **kwargs):
        leaves = paths.flatten(variables.get("params", {}))
        with adapters_seen(leaves), nn.intercept_methods(add_low_rank):
            return apply_fn(variables, *args, **kwargs)

    return adapted_apply


def check(
    apply_fn: Callable,
    variables: Mapping[str, Any],
    spec: Spec,
    *args: Any,
    handlers: Mapping[type[nn.Module], Handler] = HANDLERS,
    **kwargs: Any,
) -> None:
    """Check a spec on a model: random adapters, bound, do what they do merged.

    The first thing to do with a model of one's own. It takes four forward passes, and
    no training. With adapters that add nothing the model is to be the base.

    Args:
      apply_fn: the model's `apply`, as given to `make_spec`.
      variables: {"params": ..., other collections}, arrays.
      spec: of `make_spec`.
      *args: what the model is called with.
      handlers: as given to `make_spec`.
      **kwargs: what the model is called with.

    Raises:
      InputError: outputs differ by more than rounding; the line names the kernel that
        does most of it.
    """
    _check_call(apply_fn, variables)
    seen = adapted(apply_fn, handlers)

    given, inputs = with_arrays_apart(lambda *all: all, variables, args, kwargs)

    def way(apply: Callable, change: Callable) -> Callable[..., list[jax.Array]]:
        def run(inputs: Any, *pair: Any) -> list[jax.Array]:
            variables, args, kwargs = given(inputs)
            params = change(variables["params"], *pair)
            return floats(apply({**variables, "params": params}, *args, **kwargs))

        return run

    ways = Ways(
        base=way(apply_fn, lambda params: params),
        bound=way(seen, bind),
        merged=way(apply_fn, merge),
    )
    with jax.default_matmul_precision("highest"):
        compare(
            ways,
            inputs,
            lambda arrays: given(arrays)[0]["params"],
            spec,
            jax.random.key(0),
        )


def _check_call(apply_fn: Any, variables: Any) -> None:
    """Refuse what is mistaken for a model's apply and its variables."""
    kinds = [kind.__module__ for kind in type(apply_fn).__mro__]
    if any(kind.startswith("flax.nnx") for kind in kinds):
        raise InputError(
            f"{type(apply_fn).__name__} is an NNX model: use tsd_jax.nnx for it"
        )
    if isinstance(apply_fn, nn.Module) or not callable(apply_fn):
        raise InputError(
            f"{type(apply_fn).__name__} was given where a model's apply is needed: "
            "give model.apply"
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise InputError(
            'the variables have no "params": give {"params": params}, and the other '
            "collections beside it"
        )


def einsum(
    module: nn.Module,
    subscripts: str,
    x: jax.Array,
    kernel: str,
    *,
    dtype: Any = None,
    **settings: Any,
) -> jax.Array:
    """Contract x with a parameter of a module of your own, adapters included.

        y = einsum(subscripts, x, kernel) + einsum(subscripts, x, dK)

    To be called inside the module, in the place of `jnp.einsum`; the same function
    where no adapter is bound. `make_spec` and `adapted` need no handler for it.

    Args:
      module: the module, mostly `self`.
      subscripts: "x,kernel->y" as for `jnp.einsum`, the kernel as it is stored.
      x: the first operand.
      kernel: name of the parameter.
      dtype: both operands are cast to it first; None leaves them as they are.
      **settings: of `jnp.einsum`.
    """
    where = "/".join(module.path) or type(module).__name__
    return run_einsum(
        EinsumCall(subscripts, x, dtype, settings),
        functools.partial(read, module),
        kernel,
        where,
        candidates_of(module),
        bound_beside(module),
    )
