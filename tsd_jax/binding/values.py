"""What is known of an array of a traced program that comes from a parameter.

An array is an unchanged parameter, an unchanged input of a method, or a sum in which
contractions of the two are terms. Its axes are lists of atoms: the axes of the
parameter and of the input, wherever transposes and reshapes have brought them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Atom(NamedTuple):
    """One axis of a parameter ("k") or of a method's input ("x")."""

    of: str
    axis: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]
"""The atoms of each axis of an array; an axis that is broadcast has none."""

Change = Callable[[Dims], Dims | None]
"""What a primitive does to the axes; None where that cannot be told."""


def identity(of: str, shape: Sequence[int]) -> Dims:
    """Return the axes of an array as it is."""
    return tuple((Atom(of, axis, size),) for axis, size in enumerate(shape))


def regroup(dims: Dims, before: Sequence[int], after: Sequence[int]) -> Dims | None:
    """Follow a reshape that merges axes, or separates merged ones."""
    if any(
        math.prod(a.size for a in d) != n for d, n in zip(dims, before, strict=True)
    ):
        return None
    atoms = [atom for dim in dims for atom in dim]
    groups = []
    for place, size in enumerate(after):
        group: list[Atom] = []
        while math.prod(atom.size for atom in group) < size and atoms:
            group.append(atoms.pop(0))
        if math.prod(atom.size for atom in group) != size:
            return None
        rest = after[place + 1 :]
        own = size == 1 and not group
        while atoms and atoms[0].size == 1 and (own or not rest or rest[0] != 1):
            group.append(atoms.pop(0))
            own = False
        groups.append(tuple(group))
    return None if atoms else tuple(groups)


class Param(NamedTuple):
    """A parameter, whole or one of those a transform stacked.

    Attributes:
      source: its number. dims: its axes.
    """

    source: int
    dims: Dims

    def change(self, change: Change) -> Param | None:
        """Follow a primitive that changes axes alone."""
        dims = change(self.dims)
        return None if dims is None else Param(self.source, dims)


class View(NamedTuple):
    """An input of one call of a method.

    Attributes:
      call: number of the call. argument: number of its marked argument.
      dims: its axes.
    """

    call: int
    argument: int
    dims: Dims


class Input(NamedTuple):
    """An array that is an input of one method, or of several around each other."""

    views: tuple[View, ...]

    def change(self, change: Change) -> Input | None:
        """Follow a primitive that changes axes alone."""
        views = [view._replace(dims=change(view.dims)) for view in self.views]
        return Input(tuple(views)) if all(v.dims is not None for v in views) else None


class Product(NamedTuple):
    """A contraction, in the axes of one method's input.

    Attributes:
      view: the input. contracted, batch: pairs of axes of input and parameter.
      dims: axes of the product; those of a batch are the input's.
    """

    view: View
    contracted: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    dims: Dims


class Term(NamedTuple):
    """One contraction of a parameter.

    Attributes:
      number: of the contraction. source: the parameter.
      products: one for each method it is an input of.
    """

    number: int
    source: int
    products: tuple[Product, ...]

    def change(self, change: Change) -> Term | None:
        """Follow a primitive that changes axes alone."""
        products = [p._replace(dims=change(p.dims)) for p in self.products]
        if any(product.dims is None for product in products):
            return None
        return self._replace(products=tuple(products))


class Sum(NamedTuple):
    """Contractions, and what is added to them.

    Attributes:
      terms: the contractions.
      added: parameters that are added, and None for anything else.
    """

    terms: tuple[Term, ...]
    added: tuple[Param | None, ...] = ()

    def change(self, change: Change) -> Sum | None:
        """Follow a primitive that changes axes alone."""
        terms = tuple(term.change(change) for term in self.terms)
        if None in terms:
            return None
        added = (param and param.change(change) for param in self.added)
        return Sum(terms, tuple(added))  # pyright: ignore[reportArgumentType]


Value = Param | Input | Sum | None


def _merged(
    pairs: Sequence[tuple[int, int]], x: Dims, kernel: Dims
) -> tuple[tuple[int, int], ...] | None:
    """Pair the axes of input and parameter that lie on these axes of two arrays."""
    found = []
    for left, right in pairs:
        atoms = x[left], kernel[right]
        sizes = [[atom.size for atom in some] for some in atoms]
        if not sizes[0] or sizes[0] != sizes[1]:
            return None
        found += [(a.axis, b.axis) for a, b in zip(*atoms, strict=True)]
    return tuple(found)


def multiply(
    view: View,
    kernel: Param,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    kernel_first: bool,
) -> Product | None:
    """Contract an input with a parameter; None where that cannot be told.

    Args:
      view: the input. kernel: the parameter.
      contracted: axes of both that are summed over.
      batch: axes of both that stay.
      kernel_first: whether the free axes of the parameter come first.
    """
    sums, stays = (_merged(p, view.dims, kernel.dims) for p in (contracted, batch))
    if sums is None or stays is None:
        return None
    gone = [set(axes) for axes in zip(*contracted, *batch, strict=True)] or [set()] * 2
    free = [
        [dim for axis, dim in enumerate(dims) if axis not in gone[side]]
        for side, dims in enumerate((view.dims, kernel.dims))
    ]
    if kernel_first:
        free.reverse()
    dims = (*(view.dims[left] for left, _ in batch), *free[0], *free[1])
    return Product(view, sums, stays, dims)
