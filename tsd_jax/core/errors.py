"""The one exception that means: the input is wrong, and here is the way out."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Raise for input a user can correct; the message is one line that names it.

    Command-line programs print the message alone and exit with code 2; any other
    exception is a fault of the library and keeps its traceback.
    """


def check_choice(what: str, name: str, choices: Iterable[str]) -> None:
    """Raise InputError unless `name` is one of `choices`.

    Args:
      what: the setting that `name` was given for, for the message.
      name: as the user gave it.
      choices: the names there are.
    """
    if name not in (names := tuple(choices)):
        raise InputError(f"unknown {what} {name!r}; choose one of {', '.join(names)}")
