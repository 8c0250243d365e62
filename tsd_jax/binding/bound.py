"""What lies beside a kernel while the model runs, and what it adds to a call."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from tsd_jax.binding.calls import Call, Site, fits, other_class
from tsd_jax.binding.contraction import low_rank, spread_outputs
from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Directions, low_rank_factors, output_scale
from tsd_jax.core.errors import InputError
from tsd_jax.core.promotion import standard_promotion
from tsd_jax.core.quantization import dequantize
from tsd_jax.core.spec import KernelSpec

SUFFIX = "_tsd"


class Bound(struct.PyTreeNode):
    """What lies beside a kernel: dK = down @ up, with the kernel's own stacked axes.

    Attributes:
      down: A and L.
      up: gamma B and diag(g + o) R^T.
      key: dropout key data, or None.
      scale: c of DoRA, a row, or None.
      path: path of the kernel.
      batch: stacked axes of the kernel as its module sees it.
      dropout: probability on the input of the low-rank path.
      generator: implementation of the dropout key, or None.
      sites: what the model's methods do with the kernel; () where it was not traced.
    """

    down: jax.Array
    up: jax.Array
    key: jax.Array | None
    scale: jax.Array | None
    path: str = struct.field(pytree_node=False)
    batch: tuple[int, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)
    generator: Any = struct.field(pytree_node=False)
    sites: tuple[Site, ...] = struct.field(pytree_node=False)

    @standard_promotion
    def __call__(
        self, call: Call, y: jax.Array, read: Callable[[str], jax.Array]
    ) -> jax.Array:
        """Return y with (x down) up added, rounded once, to y's type.

        Args:
          call: what the method contracts.
          y: its output.
          read: name -> parameter of the same module.
        """
        _check_shape(self.path, call, self, y)
        total = y + _low_rank(call, self, y.shape)
        if self.scale is not None:
            row, labels = _unplace(self.scale, self.batch), call.contraction
            c = spread_outputs(row, labels, batch=self.batch, y_shape=y.shape)
            total = c * total + (1 - c) * _bias(call, y, read)
        called = _called.get()
        if called is not None:
            called.add(self.path)
        return total.astype(y.dtype)


_called: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
    "tsd_called", default=None
)


class Guarded(struct.PyTreeNode, meta.AxisMetadata):
    """A kernel that has an adapter beside it, for nobody who does not see the adapter.

    Attributes:
      value: the kernel as it was.
    """

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return tuple(paths.unboxed(self.value).shape)

    def unbox(self) -> Any:
        """Return the kernel as floats, where adapters are seen.

        Raises:
          InputError: the model runs without them.
        """
        if not _seen.get():
            raise InputError(
                "adapters are bound beside the kernels, and this model does not see "
                "them: wrap its apply, as tsd_jax.adapted(model.apply)"
            )
        return dequantize(paths.unboxed(self.value))

    def replace_boxed(self, val: Any) -> Any:
        """Return a new value in the place of the kernel.

        Args:
          val: the new value.
        """
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Guarded:
        """Tell the kernel's own box, if it has one, of a new axis.

        Args:
          index: of the axis.
          params: of the transform.
        """
        return self._told("add_axis", index, params)

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Guarded:
        """Tell the kernel's own box, if it has one, that an axis is gone.

        Args:
          index: of the axis.
          params: of the transform.
        """
        return self._told("remove_axis", index, params)

    def _told(self, what: str, *args: Any) -> Guarded:
        if not isinstance(self.value, meta.AxisMetadata):
            return self
        return Guarded(getattr(self.value, what)(*args))


_seen: contextvars.ContextVar[bool] = contextvars.ContextVar("tsd_seen", default=False)


@contextlib.contextmanager
def adapters_seen(leaves: Mapping[str, Any]) -> Iterator[None]:
    """Let guarded kernels be read, and see that adapters of unknown calls are used.

    Args:
      leaves: {path: leaf} of the bound parameters.

    Raises:
      InputError: nothing is known of an adapter's calls, and no handler described one.
    """
    called: set[str] = set()
    held: dict[str, bool] = {}
    tokens = _seen.set(True), _called.set(called), _held.set(held)
    try:
        yield
    finally:
        _seen.reset(tokens[0])
        _called.reset(tokens[1])
        _held.reset(tokens[2])
    for leaf in leaves.values():
        if not isinstance(leaf, Bound):
            continue
        if not leaf.sites and leaf.path not in called:
            raise unknown_calls(leaf.path)
        if not held.get(leaf.path, True):
            raise other_class(leaf.path, leaf.sites)


_held: contextvars.ContextVar[dict[str, bool] | None] = contextvars.ContextVar(
    "tsd_held", default=None
)


def note_class(beside: Mapping[str, Bound], kind: type) -> None:
    """Note that a module of a class holds adapters; one of several that do must fit.

    Args:
      beside: {kernel: its adapter}.
      kind: class of the module.
    """
    held = _held.get()
    if held is not None:
        for leaf in beside.values():
            held[leaf.path] = held.get(leaf.path, False) or fits(leaf.sites, kind)


def unknown_calls(path: str) -> InputError:
    """Return the error for an adapter of which nobody knows where it belongs.

    Args:
      path: of the kernel.
    """
    return InputError(
        f"{path}: nothing tells how the model uses it, its spec being none of "
        "make_spec; read the adapter with load_adapter(file, spec), or give a handler"
    )


def _check_shape(path: str, call: Call, bound: Bound, y: Any) -> None:
    """Raise InputError unless a method returns what is said to be its contraction."""
    labels = call.contraction
    sizes = dict(zip(labels.x, call.x.shape, strict=True))
    got = getattr(y, "shape", ())
    right = len(got) == len(labels.y) and all(
        sizes.get(label, size) == size
        for label, size in zip(labels.y, got, strict=True)
    )
    if not right:
        raise InputError(
            f"{path}: its method returns {got} for an input of {call.x.shape}, which "
            f"{call.subscripts!r} does not describe; make the spec from a call like "
            "this one"
        )


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
    """Return every matrix of a stack a key of its own, as data (*batch, 1, words)."""
    own = jax.random.fold_in(key, zlib.crc32(kernel.path.encode()))
    keys = jax.random.split(own, kernel.batch_shape)
    return jax.random.key_data(keys)[..., None, :]


@standard_promotion
def bound_leaves(
    base: Mapping[str, Any],
    adapters: Mapping[str, Adapter],
    directions: Mapping[str, Directions],
    dropout_key: jax.Array | None,
) -> dict[str, Bound]:
    """Return {kernel path: what lies beside that kernel}, its axes where its own are.

    Args:
      base: {path: parameter} of all that is adapted.
      adapters: {path: Adapter}. directions: {path: Directions}.
      dropout_key: a typed key, or None.
    """
    bound = {}
    for path, adapter in adapters.items():
        kernel = adapter.kernel
        down, up = low_rank_factors(adapter, directions[path])
        key = None
        if dropout_key is not None and kernel.dropout > 0:
            key = _dropout_keys(dropout_key, kernel)
        scale = output_scale(adapter, base[path], down, up)
        row = None if scale is None else scale[..., None, :]
        place = functools.partial(_place, kernel=kernel)
        placed = jax.tree.map(place, (down, up, key, row))
        bound[path] = Bound(
            *placed,
            path=path,
            batch=kernel.layout.visible_batch,
            dropout=kernel.dropout,
            generator=None if key is None else jax.random.key_impl(dropout_key),
            sites=kernel.calls,
        )
    return bound


def _drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Drop by one mask over all of x, even where the module itself sees a stack."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def _low_rank(call: Call, bound: Bound, y_shape: tuple[int, ...]) -> jax.Array:
    """Compute what one module's output gains, in the factors' type."""
    x = call.x
    if bound.key is not None:
        data = _unplace(bound.key, bound.batch)
        first = data.reshape(-1, data.shape[-1])[0]
        key = jax.random.wrap_key_data(first, impl=bound.generator)
        x = _drop(x, key, bound.dropout)
    return low_rank(
        x,
        _unplace(bound.down, bound.batch),
        _unplace(bound.up, bound.batch),
        call.contraction,
        batch=bound.batch,
        y_shape=y_shape,
    )


def _bias(
    call: Call, y: jax.Array, read: Callable[[str], jax.Array]
) -> jax.Array | float:
    """Return what is added to x K in y, ready to be broadcast; 0 where nothing is."""
    if call.bias is None:
        return 0.0
    shape = [
        size if label in call.contraction.kernel else 1
        for label, size in zip(call.contraction.y, y.shape, strict=True)
    ]
    return read(call.bias).astype(y.dtype).reshape(shape)
