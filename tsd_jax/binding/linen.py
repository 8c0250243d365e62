"""How adapters meet a Flax Linen model: beside its kernels, by interception.

    {"q_proj": {"kernel": K}}   ->   {"q_proj": {"kernel": K, "kernel_tsd": Bound}}

The model is not changed. Bound leaves lie in the `params` collection, so `nn.scan`
slices them, `nn.remat` recomputes with them, and shardings hold for them as for any
other parameter.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tsd_jax.binding.contraction import low_rank, spread_outputs
from tsd_jax.binding.linen_handlers import HANDLERS, Call, Handler, find_handler
from tsd_jax.binding.linen_trace import trace_layouts
from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Directions, low_rank_factors, output_scale
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method, get_method
from tsd_jax.core.parts import Part, Whole, place_part, whole_spec
from tsd_jax.core.spec import KernelSpec, Rule, Spec, build_spec, match_rules

SUFFIX = "_tsd"


class Bound(struct.PyTreeNode):
    """Lie beside a kernel: dK = down @ up, stacked axes where the kernel has its own.

    Attributes:
      down: A and L. up: gamma B and diag(g + o) R^T. key: dropout key data, or None.
      scale: c of DoRA, a row, or None.
      batch: stacked axes of the kernel as its module sees it.
      dropout: probability on the input of the low-rank path.
    """

    down: jax.Array
    up: jax.Array
    key: jax.Array | None
    scale: jax.Array | None
    batch: tuple[int, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)


def make_spec(
    apply_fn: Callable,
    variables: Mapping[str, Any],
    rules: Sequence[Rule | Whole],
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
        train whole is quantised, or has no such rows.
    """
    params = paths.flatten(variables["params"])
    boxed = [path for path, leaf in params.items() if not hasattr(leaf, "shape")]
    if boxed:
        raise InputError(f"{boxed[0]} is boxed metadata: call nn.meta.unbox first")
    chosen = match_rules(tuple(params), rules)
    matched = {path: rule for path, rule in chosen.items() if isinstance(rule, Rule)}
    whole = tuple(
        whole_spec(path, params[path], rule)
        for path, rule in chosen.items()
        if isinstance(rule, Whole)
    )
    layouts, owners = trace_layouts(
        apply_fn, variables, tuple(matched), handlers, args, kwargs
    )
    for path in matched:
        if path not in layouts:
            raise InputError(
                _unused(path, owners.get(path.rpartition("/")[0]), handlers)
            )
    for path, rule in matched.items():
        if rule.layout:
            layouts[path] = _overridden(path, rule, layouts[path])
    shapes = {path: tuple(params[path].shape) for path in matched}
    method = get_method(method) if isinstance(method, str) else method
    return build_spec(shapes, layouts, matched, method, whole)


def _unused(path: str, owner: str | None, handlers: Mapping) -> str:
    names = {kind.__name__ for kind in handlers}
    known = ", ".join(sorted(names))
    if owner in names:
        return (
            f"{path} is no kernel of its {owner}; narrow the rule's pattern to kernels"
        )
    if owner:
        return (
            f"{path} belongs to a module of type {owner}, which has no low-rank path "
            f"(known: {known}); leave it out of the rules, or give a handler for it"
        )
    return (
        f"{path} is matched by a rule, but no module uses it in this call of the "
        "model; leave it out of the rules, or trace a call that uses it"
    )


def _overridden(path: str, rule: Rule, traced: Layout) -> Layout:
    """Take a rule's layout; inputs and outputs may only become batch axes.

    The order of flattening permutes rows or columns of the matrix and nothing else:
    it is always the stored one, which the forward pass takes for granted.
    """
    wanted = rule.layout or traced
    inputs, outputs = tuple(sorted(wanted.inputs)), tuple(sorted(wanted.outputs))
    layout = Layout(wanted.batch, inputs, outputs, traced.lifted)
    fits = set(layout.inputs) <= set(traced.inputs)
    if not (fits and set(layout.outputs) <= set(traced.outputs)):
        raise InputError(
            f"{path}: the rule's {wanted} contradicts the module, which has "
            f"inputs {traced.inputs} and outputs {traced.outputs}"
        )
    if rule.dora and set(layout.inputs) != set(traced.inputs):
        raise InputError(
            f"{path}: the rule's layout stacks an axis the module contracts, and DoRA "
            "scales columns over all of the inputs; leave one of them out"
        )
    return layout


def _place(leaf: jax.Array, kernel: KernelSpec) -> jax.Array:
    """Move a leaf (*batch, m, n) so that its batch axes lie where the kernel's do."""
    batch = kernel.layout.batch
    ones = (1,) * (len(kernel.shape) - len(batch) - 2)
    shape = (*leaf.shape[:-2], *ones, *leaf.shape[-2:])
    return jnp.moveaxis(leaf.reshape(shape), range(len(batch)), batch)


def _unplace(leaf: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Bring a sliced leaf back to (*batch, m, n), batch as the module sees it."""
    moved = jnp.moveaxis(leaf, batch, range(len(batch)))
    return moved.reshape(*moved.shape[: len(batch)], *moved.shape[-2:])


def _dropout_keys(key: jax.Array, kernel: KernelSpec) -> jax.Array:
    """Give every matrix of a stack a key of its own, as data (*batch, 1, words)."""
    own = jax.random.fold_in(key, zlib.crc32(kernel.path.encode()))
    keys = jax.random.split(own, kernel.batch_shape)
    return jax.random.key_data(keys)[..., None, :]


def bind(
    params: Mapping[str, Any],
    adapters: Mapping[str, Adapter | Part],
    directions: Mapping[str, Directions],
    dropout_key: jax.Array | None = None,
) -> dict[str, Any]:
    """Put adapters beside kernels and parts in place, for a model run by `adapted`.

    Args:
      params: the parameter tree; its other leaves are passed on untouched.
      adapters: {path: Adapter or Part}. directions: {path: Directions}.
      dropout_key: a typed key; without one there is no dropout (evaluation).

    Returns:
      A new tree with one more leaf, `<kernel>_tsd`, beside every adapted kernel, and
      the trained value, in the base's type, where a parameter trains whole.
    """
    bound = {}
    base = paths.select(params, tuple(adapters))
    for path, adapter in adapters.items():
        if isinstance(adapter, Part):
            bound[path] = place_part(base[path], adapter)
            continue
        kernel = adapter.kernel
        down, up = low_rank_factors(adapter, directions[path])
        key = None
        if dropout_key is not None and kernel.dropout > 0:
            key = _dropout_keys(dropout_key, kernel)
        scale = output_scale(adapter, base[path], down, up)
        row = None if scale is None else scale[..., None, :]
        place = functools.partial(_place, kernel=kernel)
        placed = jax.tree.map(place, (down, up, key, row))
        bound[path + SUFFIX] = Bound(
            *placed, batch=kernel.layout.visible_batch, dropout=kernel.dropout
        )
    return paths.update(params, bound)


def _drop(x: jax.Array, key_data: jax.Array, rate: float) -> jax.Array:
    """Drop by one mask over all of x, also where the module itself sees a stack."""
    key = jax.random.wrap_key_data(key_data.reshape(-1, key_data.shape[-1])[0])
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _low_rank(call: Call, bound: Bound, y_shape: tuple[int, ...]) -> jax.Array:
    """Compute what one module's output gains, in the factors' type."""
    x = call.x
    if bound.key is not None:
        x = _drop(x, _unplace(bound.key, bound.batch), bound.dropout)
    return low_rank(
        x,
        _unplace(bound.down, bound.batch),
        _unplace(bound.up, bound.batch),
        call.contraction,
        batch=bound.batch,
        y_shape=y_shape,
    )


def _bias(module: nn.Module, call: Call, y: jax.Array) -> jax.Array | float:
    """Give what is added to x K in y, ready to be broadcast; 0 where nothing is.

    Raises:
      InputError: the module has a parameter that is neither kernel nor bias, so that
        nobody knows what it does to y.
    """
    known = (call.kernel, call.kernel + SUFFIX, call.bias)
    for name, value in module.variables["params"].items():
        if name not in known and not isinstance(value, Mapping):
            raise InputError(
                f"{'/'.join(module.path)}: DoRA scales x K and not what is added to "
                f"it, and {name!r} is neither kernel nor bias to the handler of "
                f"{type(module).__name__}: name it in Call(bias=), or adapt without "
                "DoRA"
            )
    if call.bias is None:
        return 0.0
    shape = [
        size if label in call.contraction.kernel else 1
        for label, size in zip(call.contraction.y, y.shape, strict=True)
    ]
    return module.get_variable("params", call.bias).astype(y.dtype).reshape(shape)


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

    def add_low_rank(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        handler = find_handler(module, handlers)
        if handler is None or context.method_name != "__call__":
            return y
        call = handler(module, *args, **kwargs)
        if not module.has_variable("params", call.kernel + SUFFIX):
            return y
        bound = module.get_variable("params", call.kernel + SUFFIX)
        total = y + _low_rank(call, bound, y.shape)
        if bound.scale is not None:
            row, labels = _unplace(bound.scale, bound.batch), call.contraction
            c = spread_outputs(row, labels, batch=bound.batch, y_shape=y.shape)
            total = c * total + (1 - c) * _bias(module, call, y)
        return total.astype(y.dtype)

    @functools.wraps(apply_fn)
    def adapted_apply(variables, *args, **kwargs):
        with nn.intercept_methods(add_low_rank):
            return apply_fn(variables, *args, **kwargs)

    return adapted_apply
