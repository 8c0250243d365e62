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
from tsd_jax.binding.einsum import EinsumCall, run_einsum
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.binding.linen.methods import (
    bound_beside,
    candidates_of,
    interceptor,
    read,
)
from tsd_jax.binding.linen.trace import trace_calls
from tsd_jax.binding.spec import split_rules, traced_spec
from tsd_jax.core import paths
from tsd_jax.core.adapter import Directions, Trainable
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
    """Choose what to adapt or train whole, from one abstract trace of the model.

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
        train whole is quantized, or has no such rows.
    """
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
    """Put adapters beside kernels and parts in place, for a model run by `adapted`.

    Args:
      params: the parameter tree; its other leaves are passed on untouched.
      trainable: what trains. directions: {kernel path: Directions}.
      dropout_key: a typed key; without one there is no dropout (evaluation).

    Returns:
      A new tree with one more leaf, `<kernel>_tsd`, beside every adapted kernel, and
      the trained value, in the base's type, where a parameter trains whole.
    """
    base = paths.select(params, trainable.paths)
    bound = bound_leaves(base, trainable.adapters, directions, dropout_key)
    leaves: dict[str, Any] = {path + SUFFIX: leaf for path, leaf in bound.items()}
    stored = paths.flatten(params)
    leaves |= {path: Guarded(stored[path]) for path in trainable.adapters}
    full = trainable.full
    values = {path: place_full(base[path], part) for path, part in full.items()}
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
    add_low_rank = interceptor(None, handlers)

    @functools.wraps(apply_fn)
    def adapted_apply(variables, *args, **kwargs):
        leaves = paths.flatten(variables.get("params", {}))
        with adapters_seen(leaves), nn.intercept_methods(add_low_rank):
            return apply_fn(variables, *args, **kwargs)

    return adapted_apply


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
