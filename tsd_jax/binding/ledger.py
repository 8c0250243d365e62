"""What a walk through a traced program notes of every parameter it follows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tsd_jax.binding.marks import Recorder
from tsd_jax.binding.values import (
    Input,
    Param,
    Product,
    Sum,
    Term,
    Value,
    View,
    identity,
)

OPAQUE = frozenset({"pallas_call", "ffi_call", "ragged_dot_general", "ragged_dot"})
"""Primitives that contract, and of which the walk knows nothing more."""


class Visit(NamedTuple):
    """One run of a region.

    Attributes:
      region: its number.
      shapes: of the marked arguments. lifted: axes of each that the method never sees.
      owned: {candidate: (what reaches the module, the axes it never sees)}.
    """

    region: int
    shapes: tuple[tuple[int, ...], ...]
    lifted: tuple[tuple[int, ...], ...]
    owned: Mapping[int, tuple[Value, tuple[int, ...]]]


class Exit(NamedTuple):
    """A contraction that leaves the method whose input it contracts.

    Attributes:
      term: the contraction. product: in the axes of that input.
      visit: number of the run. output: number of the marked output.
      lifted: axes of the output that the method never sees.
      added: what is added to the contraction.
    """

    term: Term
    product: Product
    visit: int
    output: int
    lifted: tuple[int, ...]
    added: tuple[Param | None, ...]


class Ledger:
    """What happens to the candidates.

    Attributes:
      uses: {candidate: how it is used, where no contraction is followed}.
      spoiled: {contraction: what is done to it before it leaves its method}.
      exits: contractions that leave their method unchanged.
      visits: the runs of regions. claimed: {(visit, claim): its view of the input}.
      opaque: {(visit, candidate)} of uses that only a handler can describe.
    """

    def __init__(self, recorder: Recorder, candidates: Collection[int]) -> None:
        self.recorder, self.candidates = recorder, frozenset(candidates)
        self.uses: dict[int, list[str]] = {}
        self.spoiled: dict[int, str] = {}
        self.sources: dict[int, int] = {}
        self.exits: list[Exit] = []
        self.visits: list[Visit] = []
        self.claimed: dict[tuple[int, int], View | None] = {}
        self.opaque: set[tuple[int, int]] = set()
        self.open: list[int] = []

    def fork(self) -> Ledger:
        """Return a ledger to try something in; this one does not change."""
        other = Ledger(self.recorder, self.candidates)
        other.visits, other.open = [*self.visits], [*self.open]
        other.sources = {**self.sources}
        return other

    def contract(self, kernel: Param, products: Sequence[Product]) -> Sum:
        """Note a new contraction."""
        number = len(self.sources)
        self.sources[number] = kernel.source
        return Sum((Term(number, kernel.source, tuple(products)),))

    def consume(self, value: Value, how: str, primitive: str = "") -> None:
        """Note that a value is used in a way that is not followed further."""
        if isinstance(value, Sum):
            for term in value.terms:
                self.spoiled.setdefault(term.number, how)
        elif isinstance(value, Param) and value.source in self.candidates:
            visit = self._claiming(value.source)
            if primitive in OPAQUE and visit is not None:
                self.opaque.add((visit, value.source))
            else:
                self.uses.setdefault(value.source, []).append(how)

    def _claiming(self, source: int) -> int | None:
        """Find the innermost open run whose handler claims a candidate."""
        for visit in reversed(self.open):
            claims = self.recorder.claims.get(self.visits[visit].region, ())
            if any(source == claimed for claimed, _, _ in claims):
                return visit
        return None

    def where(self, equation: Any) -> str:
        """Name the place of an equation in the model."""
        stack = str(getattr(equation.source_info, "name_stack", ""))
        if stack or not self.open:
            return stack or "the model"
        return self.recorder.regions[self.visits[self.open[-1]].region].module

    def enter(self, equation: Any, inputs: Sequence[Value]) -> list[Value]:
        """Begin a run of a region; its arguments become its inputs."""
        count, lifted = equation.params["count"], equation.params["lifted"]
        region = equation.params["region"]
        number = len(self.visits)
        shapes = tuple(tuple(atom.aval.shape) for atom in equation.invars)
        sources = self.recorder.regions[region].sources
        owned = zip(inputs[count:], lifted[count:], strict=True)
        self.visits.append(
            Visit(
                region,
                shapes[:count],
                lifted[:count],
                dict(zip(sources, owned, strict=True)),
            )
        )
        self.open.append(number)
        outputs: list[Value] = []
        for argument, value in enumerate(inputs[:count]):
            view = View(number, argument, identity("x", shapes[argument]))
            outer = value.views if isinstance(value, Input) else ()
            keep = isinstance(value, Param)
            outputs.append(value if keep else Input((*outer, view)))
            if isinstance(value, Sum):
                name = self.recorder.regions[region].module
                self.consume(value, f"is passed on to {name}")
        return outputs

    def leave(self, equation: Any, inputs: Sequence[Value]) -> list[Value]:
        """End a run; contractions of its own parameters and inputs are complete."""
        number = self._current(equation.params["region"])
        if number is None:  # of a trial run, by which Flax finds what a scan shares
            return list(inputs)
        while self.open and self.open[-1] >= number:
            self.open.pop()
        lifted = equation.params["lifted"]
        return [
            self._complete(number, place, lifted[place], value)
            for place, value in enumerate(inputs)
        ]

    def claim(self, equation: Any, inputs: Sequence[Value]) -> list[Value]:
        """Note which input a handler names."""
        number = self._current(equation.params["region"])
        if number is None:
            return []
        (value,) = inputs
        views = value.views if isinstance(value, Input) else ()
        mine = [view for view in views if view.call == number]
        key = (number, equation.params["number"])
        self.claimed[key] = mine[0] if mine else None
        return []

    def _current(self, region: int) -> int | None:
        """Find the latest run of a region."""
        runs = enumerate(self.visits)
        mine = [number for number, visit in runs if visit.region == region]
        return mine[-1] if mine else None

    def _complete(
        self, number: int, place: int, lifted: tuple[int, ...], value: Value
    ) -> Value:
        if not isinstance(value, Sum):
            return value
        rest: list[Term] = []
        for term in value.terms:
            products = [p for p in term.products if p.view.call == number]
            if products and term.source in self.visits[number].owned:
                others = len(value.terms) - 1
                added = (*value.added, *((None,) * others))
                self.exits.append(Exit(term, products[0], number, place, lifted, added))
            else:
                rest.append(term)
        return Sum(tuple(rest), (*value.added, None)) if rest else None
