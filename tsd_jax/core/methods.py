"""The methods: what happens at launch, and what trains after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tsd_jax.core.errors import InputError, check_choice

RANKINGS = ("rates", "largest", "smallest", "random")
"""What directions may be ranked by; `extraction.ranking` has a score for each."""

STARTS = ("sigma", "sigma+p", "zero")
"""What A and B may restart from; `extraction.restarts` has a formula for each."""


@dataclass(frozen=True)
class Method:
    """Say what a method does at launch; every method is one of these compositions.

    Attributes:
      name: the name users give.
      gains: train the coordinates of the top-s directions after launch (Dash).
      restart: restart A and B from the top-r directions (Init).
      keep: with `restart`, keep what pre-launch learned as frozen factors; without,
        it is dropped and the model is the pretrained one right after launch.
      ranking: which directions come first, one of `RANKINGS`.
      start: with `restart`, what A and B start from, one of `STARTS`.
    """

    name: str
    gains: bool = False
    restart: bool = False
    keep: bool = False
    ranking: str = "rates"
    start: str = "sigma"

    @property
    def launches(self) -> bool:
        """Whether there is a launch at all."""
        return self.gains or self.restart

    @property
    def begins_again(self) -> bool:
        """Whether launch drops all that training has changed."""
        return self.restart and not self.keep

    @property
    def needs_delta(self) -> bool:
        """Whether the ranking looks at what training has changed."""
        return self.launches and (self.ranking == "rates" or self.start == "sigma+p")

    def ranked(self, rank: int, directions: int) -> int:
        """Count the directions that launch takes from the ranking of one kernel."""
        return max(directions * self.gains, rank * self.restart)

    def columns(self, rank: int, directions: int) -> int:
        """Count the columns of the frozen factors L and R of one kernel."""
        return self.ranked(rank, directions) + rank * self.keep


METHODS = {
    method.name: method
    for method in (
        Method("lora"),
        Method("dash", gains=True),
        Method("init", restart=True),
        Method("tsd", gains=True, restart=True),
        # Rivals and a control, which differ from Init in their directions only.
        Method("pissa", restart=True, ranking="largest"),
        Method("milora", restart=True, ranking="smallest"),
        Method("random", restart=True, ranking="random"),
    )
}


def get_method(
    name: str,
    *,
    keep: bool = False,
    ranking: str | None = None,
    start: str | None = None,
) -> Method:
    """Look a method up by name, in the reading asked for.

    Args:
      name: "lora", "dash", "init" or "tsd" (paper sections 2 to 4); "pissa", "milora"
        or "random".
      keep: see `Method.keep`.
      ranking, start: see `Method`; None leaves the method's own.

    Raises:
      InputError: the name is unknown, or a reading fits no method of this kind.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if keep and not method.restart:
        raise InputError(
            f"keep=True has no meaning for method {name!r}, which never drops what "
            "pre-launch learned; use it with 'init' or 'tsd'"
        )
    if start is not None and not method.restart:
        raise InputError(
            f"start={start!r} has no meaning for method {name!r}, which restarts "
            "nothing; use it with 'init' or 'tsd'"
        )
    if ranking is not None and not method.launches:
        raise InputError(
            f"ranking={ranking!r} has no meaning for method {name!r}, which launches "
            "nothing"
        )
    check_choice("ranking", ranking or method.ranking, RANKINGS)
    check_choice("start", start or method.start, STARTS)
    return replace(
        method,
        keep=keep,
        ranking=ranking or method.ranking,
        start=start or method.start,
    )
