"""From what was noted of each parameter to its layout and its calls, or a refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from string import ascii_letters
from typing import Any, NamedTuple

from tsd_jax.binding.calls import EINSUM, Site
from tsd_jax.binding.contraction import Contraction
from tsd_jax.binding.ledger import Exit, Ledger, Visit
from tsd_jax.binding.values import Param
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout

WAY_OUT = (
    "leave it out of the rules or train it in full; where a module of yours contracts "
    "it, use this library's einsum there"
)


class Traced(NamedTuple):
    """What the trace told of one kernel.

    Attributes:
      layout: of its axes. sites: its calls.
    """

    layout: Layout
    sites: tuple[Site, ...]


def refuse(path: str, what: str) -> InputError:
    """Return the error for a kernel that has no low-rank path."""
    return InputError(f"{path} {what}: no low-rank path can stand for it; {WAY_OUT}")


def _visible(path: str, visit: Visit, source: int) -> tuple[int, ...]:
    """Return the stored axes that a module sees, in the order in which it sees them."""
    arrived, lifted = visit.owned[source]
    dims: Sequence[Any] = getattr(arrived, "dims", ())
    axes = [dim for place, dim in enumerate(dims) if place not in lifted]
    order = [atom.axis for dim in axes for atom in dim]
    same = isinstance(arrived, Param) and arrived.source == source
    if not same or any(len(dim) != 1 for dim in axes) or order != sorted(order):
        raise refuse(
            path,
            "is changed by the program before its module uses it, more than by "
            "taking stacked axes away",
        )
    return tuple(order)


def traced_layout(
    labels: Contraction, visible: Sequence[int], shape: Sequence[int]
) -> Layout:
    """Return the stored layout of a kernel whose module sees the axes `visible`."""
    batch, inputs, outputs = (tuple(visible[n] for n in r) for r in labels.axes())
    lifted = tuple(axis for axis in range(len(shape)) if axis not in visible)
    return Layout(tuple(sorted((*lifted, *batch))), inputs, outputs, lifted)


class Reader:
    """Reads the notes of one trace.

    Args:
      ledger: the notes. paths, shapes: of the parameters, by their number.
    """

    def __init__(
        self,
        ledger: Ledger,
        paths: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        self.ledger, self.paths, self.shapes = ledger, paths, shapes

    def read(self, source: int) -> Traced | None:
        """Return what one candidate does, None where no method uses it.

        Raises:
          InputError: it is used in another way than by contractions that are alike.
        """
        path = self.paths[source]
        self._check_uses(source)
        found: dict[int, list[tuple[Site, Layout]]] = {}
        for leaving in self.ledger.exits:
            if leaving.term.source == source:
                found.setdefault(leaving.visit, []).append(self._site(leaving))
        for visit, site in self._opaque(source):
            found.setdefault(visit, []).append(site)
        if not found:
            return None
        each = [pair for pairs in found.values() for pair in pairs]
        layout = each[0][1]
        for site, other in each:
            if other != layout:
                raise InputError(
                    f"{path} is ambiguous: one call contracts it as {layout}, another "
                    f"as {other} ({site.method}); leave it out of the rules"
                )
        sites = tuple(dict.fromkeys(site for site, _ in each))
        self._check_alike(source, found, sites)
        return Traced(layout, sites)

    def _check_uses(self, source: int) -> None:
        """Refuse a candidate that is used in another way than by contractions."""
        path, ledger = self.paths[source], self.ledger
        for how in ledger.uses.get(source, ()):
            raise refuse(path, how)
        for number, how in ledger.spoiled.items():
            if ledger.sources[number] == source:
                raise refuse(path, f"is contracted, and the product {how}")
        left = Counter(leaving.term.number for leaving in ledger.exits)
        for number, times in left.items():
            if times > 1 and ledger.sources[number] == source:
                raise refuse(path, "is contracted, and its method returns it twice")

    def _check_alike(
        self,
        source: int,
        found: Mapping[int, Sequence[tuple[Site, Layout]]],
        sites: Sequence[Site],
    ) -> None:
        """Refuse methods that use a candidate in one call and not in another."""
        ledger, path = self.ledger, self.paths[source]
        methods = {site.method for site in sites}
        seen: dict[tuple[str, int], tuple[Site, ...]] = {}
        for number, visit in enumerate(ledger.visits):
            region = ledger.recorder.regions[visit.region]
            if source not in visit.owned or region.method not in methods:
                continue
            mine = tuple(site for site, _ in found.get(number, ()))
            places = {(site.argument, site.output) for site in mine}
            if len(places) != len(mine) or not mine:
                raise refuse(
                    path,
                    f"is contracted {len(mine)} times by one call of {region.method}, "
                    "and else once",
                )
            if region.method == EINSUM:
                continue
            key = (region.method, sum(site.subscripts.index(",") for site in mine))
            if seen.setdefault(key, mine) != mine:
                raise InputError(
                    f"{path} is ambiguous: calls of {region.method} contract it in "
                    "two ways; leave it out of the rules"
                )

    def _site(self, leaving: Exit) -> tuple[Site, Layout]:
        """Describe a contraction in the axes that its module sees."""
        ledger, source = self.ledger, leaving.term.source
        path, visit = self.paths[source], ledger.visits[leaving.visit]
        region = ledger.recorder.regions[visit.region]
        visible = _visible(path, visit, source)
        view = leaving.product.view
        labels = _labels(leaving, visit, visible)
        if labels is None:
            raise refuse(path, "is taken apart or its product reshaped by its module")
        bias, more = self._bias(leaving, labels)
        site = Site(
            region.method,
            region.arguments[view.argument],
            ledger.recorder.outputs[visit.region][leaving.output],
            f"{labels.x},{labels.kernel}->{labels.y}",
            bias,
            more,
        )
        self._check_claims(leaving, visit, labels)
        return site, traced_layout(labels, visible, self.shapes[source])

    def _bias(self, leaving: Exit, labels: Contraction) -> tuple[str | None, bool]:
        """Name the bias, and tell whether anything else is added."""
        if not leaving.added:
            return None, False
        bias, *others = leaving.added
        if bias is None or others:
            return None, True
        owner, _, name = self.paths[bias.source].rpartition("/")
        places = [n for n in range(len(bias.dims)) if n not in leaving.lifted]
        dims = [[atom for atom in bias.dims[n] if atom.size > 1] for n in places]
        wide = [any(a.size > 1 for a in leaving.product.dims[n]) for n in places]
        axes = [atom.axis for dim in dims for atom in dim]
        beside = owner == self.paths[leaving.term.source].rpartition("/")[0]
        along = all(
            len(dim) == (size and label in labels.kernel)
            for dim, size, label in zip(dims, wide, labels.y, strict=True)
        )
        if beside and along and axes == sorted(axes):
            return name, False
        return None, True

    def _check_claims(self, leaving: Exit, visit: Visit, labels: Contraction) -> None:
        """Refuse a handler that describes something else than the trace shows."""
        ledger, source = self.ledger, leaving.term.source
        claims = ledger.recorder.claims.get(visit.region, ())
        for number, (claimed, subscripts, _) in enumerate(claims):
            view = ledger.claimed.get((leaving.visit, number))
            if claimed != source or view is None:
                continue
            skip = visit.lifted[view.argument]
            axes = [a.axis for d in view.dims for a in d if a.axis not in skip]
            theirs = Contraction.parse(subscripts, len(axes))
            own = [a for a in range(len(view.dims)) if a not in skip]
            if view.argument != leaving.product.view.argument or not _same(
                theirs, labels, [own.index(axis) for axis in axes]
            ):
                ours = f"{labels.x},{labels.kernel}->{labels.y}"
                raise InputError(
                    f"{self.paths[source]}: its handler describes {subscripts!r}, but "
                    f"the module computes {ours!r}; correct the handler, or drop it"
                )

    def _opaque(self, source: int) -> list[tuple[int, tuple[Site, Layout]]]:
        """Take a handler's word where the trace cannot look inside."""
        found = []
        ledger = self.ledger
        for visit in sorted(v for v, claimed in ledger.opaque if claimed == source):
            run = ledger.visits[visit]
            region = ledger.recorder.regions[run.region]
            claims = ledger.recorder.claims[run.region]
            number = next(n for n, claim in enumerate(claims) if claim[0] == source)
            view = ledger.claimed.get((visit, number))
            if view is None:
                raise refuse(self.paths[source], "is used with no input of its module")
            skip = run.lifted[view.argument]
            ndim = sum(axis not in skip for axis in range(len(view.dims)))
            labels = Contraction.parse(claims[number][1], ndim)
            visible = _visible(self.paths[source], run, source)
            site = Site(
                region.method,
                region.arguments[view.argument],
                "",
                f"{labels.x},{labels.kernel}->{labels.y}",
                claims[number][2],
            )
            layout = traced_layout(labels, visible, self.shapes[source])
            found.append((visit, (site, layout)))
        return found


def _labels(leaving: Exit, visit: Visit, visible: Sequence[int]) -> Contraction | None:
    """Write a contraction as subscripts, in the axes that its module sees."""
    product = leaving.product
    hidden = visit.lifted[product.view.argument]
    letters = iter(ascii_letters)
    ndim = len(visit.shapes[product.view.argument])
    x = {axis: next(letters) for axis in range(ndim) if axis not in hidden}
    kernel: dict[int, str] = {}
    for left, right in (*product.contracted, *product.batch):
        if (left in x) != (right in visible):
            return None
        if left in x:
            kernel[right] = x[left]
    for axis in visible:
        kernel[axis] = kernel.get(axis) or next(letters)
    y = []
    for place, dim in enumerate(product.dims):
        seen = [(x if atom.of == "x" else kernel).get(atom.axis) for atom in dim]
        if place in leaving.lifted:
            if any(seen):
                return None
        elif len(seen) != 1 or seen[0] is None:
            return None
        else:
            y.append(seen[0])
    labels = ("".join(x.values()), "".join(kernel[axis] for axis in visible))
    if not set(labels[1]) <= {*labels[0], *y}:
        return None
    return Contraction(*labels, "".join(y))


def _same(theirs: Contraction, ours: Contraction, axes: Sequence[int]) -> bool:
    """Return whether two descriptions are one, `axes` being theirs of ours for x."""
    if len(theirs.kernel) != len(ours.kernel) or len(axes) != len(theirs.x):
        return False
    pairs = {
        *zip(theirs.x, (ours.x[axis] for axis in axes), strict=True),
        *zip(theirs.kernel, ours.kernel, strict=True),
    }
    renamed = dict(pairs)
    one_to_one = len(pairs) == len(renamed) == len({new for _, new in pairs})
    return one_to_one and ours.y == "".join(renamed.get(c, "?") for c in theirs.y)
