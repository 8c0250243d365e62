"""The one exception that means: the input is wrong, and here is the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Raise for input a user can correct; the message is one line that names it.

    Command-line programs print the message alone and exit with code 2; any other
    exception is a fault of the library and keeps its traceback.
    """
