"""Rules choose what trains; a spec fixes the shapes of everything that is added."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from tsd_jax.core.errors import InputError, check_choice
from tsd_jax.core.full_params import Full, FullSpec
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method
from tsd_jax.core.paths import check_pattern
from tsd_jax.core.ranges import Count, Positive, Range, Share, check_ranges

SCALINGS = {
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}

DirectionCount = Annotated[
    int, Range(1, hint="for no directions use method 'lora' or 'init'")
]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Adapt every kernel whose whole path matches `pattern`; the first match wins.

    Attributes:
      pattern: regular expression over "/"-joined paths, matched in full.
      rank: r, the number of columns of A.
      alpha: numerator of the scale; gamma = alpha / r ("lora") or alpha / sqrt(r)
        ("rslora", arXiv:2312.03732).
      directions: s, the number of task-specific directions Dash trains.
      dropout: probability of dropping an input element of the low-rank path.
      scaling: "lora" or "rslora".
      layout: roles of the kernel's axes; None for those found by tracing.
      auto_directions: whether every matrix trains only the directions before the knee
        of its change rates, at most `directions` of them.
      dora: whether the norms of the adapted kernel's columns train separately from
        their directions (DoRA, arXiv:2402.09353), whatever the method.
    """

    pattern: str
    rank: Count = 8
    alpha: Positive = 16.0
    directions: DirectionCount = 8
    dropout: Share = 0.0
    scaling: str = "lora"
    layout: Layout | None = None
    auto_directions: bool = False
    dora: bool = False

    def __post_init__(self):
        """Refuse values that fit no kernel."""
        where = f"rule {self.pattern!r}"
        check_pattern(self.pattern, where=where)
        check_ranges(self, f"{where}: ")
        check_choice("scaling", self.scaling, SCALINGS, where=where)


AnyRule = TypeVar("AnyRule", bound=Rule | Full)


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """The static description of one adapted kernel; hashable.

    Attributes:
      path: "/"-joined path in the parameter tree.
      shape: shape as stored.
      layout: roles of the stored axes.
      rank: r.
      alpha: numerator of the scale, as in the rule.
      scale: gamma.
      gains: number of trainable coordinates; 0 where the method has none.
      ranked: number of directions taken at launch.
      columns: number of columns of the frozen factors L and R.
      dropout: probability of dropping an input element of the low-rank path.
      gated: whether launch decides how many of the gains every matrix uses.
      dora: whether a magnitude is trained for every output.
      calls: how the model's methods contract it, as the binding traced it; () where
        that is not known. No file has it.
    """

    path: str
    shape: tuple[int, ...]
    layout: Layout
    rank: int
    alpha: float
    scale: float
    gains: int
    ranked: int
    columns: int
    dropout: float
    gated: bool = False
    dora: bool = False
    calls: tuple = field(default=(), repr=False)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self.layout.shape(self.shape)[:-2]

    @property
    def fan_in(self) -> int:
        """Size of the flattened input axes."""
        return self.layout.shape(self.shape)[-2]

    @property
    def fan_out(self) -> int:
        """Size of the flattened output axes."""
        return self.layout.shape(self.shape)[-1]

    @property
    def trainable(self) -> int:
        """Number of trainable parameters beside this kernel."""
        factors = self.rank * (self.fan_in + self.fan_out)
        magnitudes = self.fan_out if self.dora else 0
        return math.prod(self.batch_shape) * (factors + self.gains + magnitudes)


@dataclass(frozen=True)
class Spec:
    """What is adapted and how; static under jit.

    Attributes:
      kernels: one entry per adapted kernel, in the order of the parameter tree.
      method: what happens at launch.
      full: one entry per fully trained parameter, in the same order.
    """

    kernels: tuple[KernelSpec, ...]
    method: Method
    full: tuple[FullSpec, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the adapted kernels."""
        return tuple(kernel.path for kernel in self.kernels)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(each.trainable for each in (*self.kernels, *self.full))


def match_rules(paths: Sequence[str], rules: Sequence[AnyRule]) -> dict[str, AnyRule]:
    """Return {path: rule} for every path that a rule matches in full.

    The first rule that matches wins.

    Args:
      paths: paths of the parameters.
      rules: the rules, in order.

    Raises:
      InputError: no rule adapts kernels, or a rule matches nothing or only paths that
        earlier rules took.
    """
    if not any(isinstance(rule, Rule) for rule in rules):
        raise InputError("no rules: name at least one kernel to adapt")
    matched: dict[str, AnyRule] = {}
    for rule in rules:
        hits = [path for path in paths if re.fullmatch(rule.pattern, path)]
        if not hits:
            near = difflib.get_close_matches(rule.pattern, paths, n=3, cutoff=0.0)
            raise InputError(
                f"rule {rule.pattern!r} matches no parameter; "
                f"the nearest paths are {', '.join(near)}"
            )
        fresh = [path for path in hits if path not in matched]
        if not fresh:
            raise InputError(
                f"rule {rule.pattern!r} matches only what earlier rules took "
                f"({hits[0]}, ...); put it before them or drop it"
            )
        matched.update(dict.fromkeys(fresh, rule))
    return {path: matched[path] for path in paths if path in matched}


def kernel_spec(
    path: str, shape: tuple[int, ...], layout: Layout, rule: Rule, method: Method
) -> KernelSpec:
    """Return the shapes of everything beside one kernel.

    Args:
      path: path of the kernel.
      shape: shape as stored.
      layout: roles of its axes.
      rule: the rule that matched it.
      method: what happens at launch.

    Raises:
      InputError: the layout does not fit, rank or directions exceed min(in, out), or
        the method has no directions to count.
    """
    layout.validate(path, len(shape))
    *_, fan_in, fan_out = layout.shape(shape)
    limit = min(fan_in, fan_out)
    asked = {"rank": rule.rank}
    if method.gains:
        asked["directions"] = rule.directions
    for name, value in asked.items():
        if value > limit:
            raise InputError(
                f"{path}: {name} {value} is larger than the kernel "
                f"(in {fan_in}, out {fan_out}); use at most {limit}"
            )
    if rule.auto_directions and not (method.gains and method.ranking == "rates"):
        raise InputError(
            f"rule {rule.pattern!r}: auto_directions=True has no meaning for method "
            f"{method.name!r}, which trains no directions that change rates rank; use "
            "it with 'dash' or 'tsd'"
        )
    return KernelSpec(
        path=path,
        shape=tuple(shape),
        layout=layout,
        rank=rule.rank,
        alpha=rule.alpha,
        scale=SCALINGS[rule.scaling](rule.alpha, rule.rank),
        gains=rule.directions if method.gains else 0,
        ranked=method.ranked(rule.rank, rule.directions),
        columns=method.columns(rule.rank, rule.directions),
        dropout=rule.dropout,
        gated=rule.auto_directions,
        dora=rule.dora,
    )


def build_spec(
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, Layout],
    matched: Mapping[str, Rule],
    method: Method,
    full: tuple[FullSpec, ...] = (),
) -> Spec:
    """Return the spec of all matched kernels.

    Args:
      shapes: {path: shape as stored}.
      layouts: {path: layout}, the rule's own where it has one.
      matched: {path: rule}, as `match_rules` returns them.
      method: what happens at launch.
      full: fully trained parameters, as `full_spec` returns them.

    Raises:
      InputError: see `kernel_spec`.
    """
    kernels = (
        kernel_spec(path, shapes[path], layouts[path], rule, method)
        for path, rule in matched.items()
    )
    return Spec(tuple(kernels), method, full)
