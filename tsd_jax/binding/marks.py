"""Marks in a traced program: where a method of a module begins and where it returns.

A mark is the identity on its arrays. It exists while `make_spec` traces a model and in
no other program. `jax.vmap` tells it which axes the method never sees.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching

_numbers = itertools.count()


def _identity(*avals: Any, count: int, **params: Any) -> list:
    del params
    return list(avals[:count])


def _primitive(name: str) -> jex.Primitive:
    """Make a primitive that returns its first `count` operands.

    Its tangents are zeros: what the derivative of a method does with a kernel follows
    from what the method does with it.
    """
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(_identity)

    def batch(args: Sequence, dims: Sequence, *, lifted: tuple, **params: Any):
        moved = tuple(
            old if dim is None else (dim, *(axis + (axis >= dim) for axis in old))
            for old, dim in zip(lifted, dims, strict=True)
        )
        outputs = primitive.bind(*args, lifted=moved, **params)
        return outputs, list(dims[: params["count"]])

    def jvp(primals: Sequence, tangents: Sequence, **params: Any):
        del tangents
        outputs = primitive.bind(*primals, **params)
        return outputs, [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in outputs]

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    return primitive


ENTER, LEAVE, CLAIM = map(_primitive, ("tsd_enter", "tsd_leave", "tsd_claim"))


class Region(NamedTuple):
    """One call of a method of a module that owns candidates.

    Attributes:
      method: name that tells the method from others, as `method_name` gives it.
      module: path or type of the module, for messages.
      arguments: key path of each marked argument.
      sources: number of each candidate the module owns.
    """

    method: str
    module: str
    arguments: tuple[str, ...]
    sources: tuple[int, ...]


class Recorder:
    """The regions of one trace.

    Attributes:
      number: no other recorder has it, so that no cached program is taken for ours.
      regions: in the order of their calls. outputs: {region: key paths of outputs}.
      claims: {region: (source, subscripts, bias)} of handlers.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.regions: list[Region] = []
        self.outputs: dict[int, tuple[str, ...]] = {}
        self.claims: dict[int, list[tuple[int, str, str | None]]] = {}

    def run(
        self,
        method: str,
        module: str,
        owned: Mapping[int, jax.Array],
        arguments: Any,
        call: Callable[[Any], Any],
        claim: Callable[[Any], tuple[int, Any] | None] = lambda _: None,
        is_leaf: Callable[[Any], bool] | None = None,
    ) -> Any:
        """Run one call of a method between two marks.

        Args:
          method: its name. module: of the module.
          owned: {candidate: its value as the module sees it}.
          arguments: a tree of the call's arguments.
          call: from arguments to outputs.
          claim: from arguments to the candidate and `Call` of a handler.
          is_leaf: what in arguments and outputs is not to be opened.
        """
        number = len(self.regions)
        names, arrays, rebuild = _arrays(arguments, is_leaf)
        self.regions.append(Region(method, module, names, tuple(owned)))
        marked = ENTER.bind(
            *arrays,
            *owned.values(),
            region=number,
            count=len(arrays),
            lifted=((),) * (len(arrays) + len(owned)),
        )
        arguments = rebuild(marked)
        outputs = call(arguments)
        self._claim(number, claim(arguments))
        names, arrays, rebuild = _arrays(outputs, is_leaf)
        self.outputs[number] = names
        lifted = ((),) * len(arrays)
        return rebuild(
            LEAVE.bind(*arrays, region=number, count=len(arrays), lifted=lifted)
        )

    def _claim(self, region: int, claimed: tuple[int, Any] | None) -> None:
        """Mark the input that a handler names."""
        if claimed is None:
            return
        source, call = claimed
        kept = self.claims.setdefault(region, [])
        kept.append((source, call.subscripts, call.bias))
        CLAIM.bind(call.x, region=region, count=0, lifted=((),), number=len(kept) - 1)


def _arrays(
    tree: Any, is_leaf: Callable[[Any], bool] | None
) -> tuple[tuple[str, ...], list[jax.Array], Callable[[Sequence], Any]]:
    """Return key paths and values of a tree's floats, and what replaces them."""
    flat, structure = jax.tree.flatten_with_path(tree, is_leaf=is_leaf)
    leaves = [leaf for _, leaf in flat]
    places = [
        n
        for n, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]

    def rebuild(values: Sequence) -> Any:
        new = dict(zip(places, values, strict=True))
        return structure.unflatten(new.get(n, leaf) for n, leaf in enumerate(leaves))

    names = tuple(jax.tree_util.keystr(flat[n][0]) for n in places)
    return names, [leaves[n] for n in places], rebuild


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar(
    "tsd_recorder", default=None
)


def recorder() -> Recorder | None:
    """Return the recorder of the trace that is going on, or None."""
    return _recorder.get()


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Record the regions of what runs inside."""
    token = _recorder.set(Recorder())
    try:
        yield _recorder.get()  # pyright: ignore[reportReturnType]
    finally:
        _recorder.reset(token)
