"""The methods: what happens at launch, and what trains after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tsd_jax.core.errors import InputError


@dataclass(frozen=True)
class Method:
    """Say what a method does at launch; every method is one of these compositions.

    Attributes:
      name: the name users give.
      gains: train the coordinates of the top-s directions after launch (Dash).
      restart: restart A and B from the top-r directions (Init).
      keep: with `restart`, keep what pre-launch learned as frozen factors; without,
        it is dropped and the model is the pretrained one right after launch.
    """

    name: str
    gains: bool = False
    restart: bool = False
    keep: bool = False

    @property
    def launches(self) -> bool:
        """Whether there is a launch at all."""
        return self.gains or self.restart

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
    )
}


def get_method(name: str, *, keep: bool = False) -> Method:
    """Look a method up by name, in the reading that drops or keeps pre-launch.

    Args:
      name: "lora", "dash", "init" or "tsd" (paper sections 2 to 4).
      keep: see `Method.keep`.

    Raises:
      InputError: the name is unknown, or `keep` fits no method without restart.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if keep and not method.restart:
        raise InputError(
            f"keep=True has no meaning for method {name!r}, which never drops what "
            "pre-launch learned; use it with 'init' or 'tsd'"
        )
    return replace(method, keep=keep)
