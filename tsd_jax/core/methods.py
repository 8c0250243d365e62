"""The methods: what happens at launch, and what trains afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tsd_jax.core.errors import InputError, check_choice

RANKINGS = ("rates", "largest", "smallest", "random")
"""What directions can be ranked by; `extraction.ranking.SCORES` has a score each."""

STARTS = ("sigma", "sigma+p", "zero")
"""What A and B can restart from; `extraction.restarts.RESTARTS` has a formula each."""


@dataclass(frozen=True)
class Method:
    """What happens at launch; every method is a combination of these choices.

    Attributes:
      name: name of the method.
      gains: whether the coordinates of the top-s directions train after launch (Dash).
      restart: whether A and B restart from the top-r directions (Init).
      keep: with `restart`, whether what pre-launch learned is kept as frozen factors;
        otherwise it is dropped, and right after launch the model is the pretrained one.
      ranking: which directions come first, one of RANKINGS.
      start: with `restart`, what A and B restart from, one of STARTS.
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
        """Whether launch drops everything that training has changed."""
        return self.restart and not self.keep

    @property
    def needs_delta(self) -> bool:
        """Whether launch depends on what training has changed."""
        return self.launches and (self.ranking == "rates" or self.start == "sigma+p")

    def ranked(self, rank: int, directions: int) -> int:
        """Return the number of directions that launch takes of one kernel's ranking.

        Args:
          rank: r of the kernel.
          directions: s of the kernel.
        """
        return max(directions if self.gains else 0, rank if self.restart else 0)

    def columns(self, rank: int, directions: int) -> int:
        """Return the number of columns of one kernel's frozen factors L and R.

        Args:
          rank: r of the kernel.
          directions: s of the kernel.
        """
        return self.ranked(rank, directions) + (rank if self.keep else 0)


METHODS = {
    method.name: method
    for method in (
        Method("lora"),
        Method("dash", gains=True),
        Method("init", restart=True),
        Method("tsd", gains=True, restart=True),
        # Baselines and a control, which differ from Init only in their directions.
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
    """Return a method by its name, with its choices changed where asked.

    Args:
      name: "lora", "dash", "init" or "tsd" (paper, sections 2 to 4); "pissa", "milora"
        or "random".
      keep: see `Method.keep`.
      ranking: see `Method.ranking`; None leaves the method's own.
      start: see `Method.start`; None leaves the method's own.

    Raises:
      InputError: a name is unknown, or a choice has no meaning for the method.

    Source: arXiv:2409.01035; PiSSA, arXiv:2404.02948; MiLoRA, arXiv:2406.09044.
    """
    check_choice("method", name, METHODS)
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
