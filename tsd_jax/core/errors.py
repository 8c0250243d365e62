"""The exception for wrong input, and the check of a name against its choices."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """An error in the input that the user can correct; its message is one line.

    Command-line programs print only the message and exit with code 2. Any other
    exception is a fault of the library and keeps its traceback.
    """


def check_choice(
    what: str, name: str, choices: Iterable[str], *, where: str = ""
) -> None:
    """Raise InputError unless `name` is one of `choices`.

    Args:
      what: the setting that the name was given for.
      name: the name as the user gave it.
      choices: the valid names.
      where: what the message begins with, such as the rule at fault.

    Raises:
      InputError: the name is not among the choices; the message lists them.
    """
    if name not in (names := tuple(choices)):
        prefix = f"{where}: " if where else ""
        raise InputError(
            f"{prefix}unknown {what} {name!r}; choose one of {', '.join(names)}"
        )
