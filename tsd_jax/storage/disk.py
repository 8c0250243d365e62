"""Full disks: which errors say so, however wrapped, and what others say beside them."""

from __future__ import annotations

import errno
import logging
import sys
import threading
from typing import Any

_CODES = (errno.ENOSPC, errno.EDQUOT)
# What is left of the code in errors of libraries that write by themselves.
_WORDS = ("No space left on device", "Disk quota exceeded")


def is_full(error: BaseException | None) -> bool:
    """Return whether a full disk, or a used-up quota, is behind an error.

    Args:
      error: as it was caught; its causes are looked at as well.
    """
    while error is not None:
        coded = isinstance(error, OSError) and error.errno in _CODES
        if coded or any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


class _NotFull(logging.Filter):
    """Passes all records but those of a full disk."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and is_full(record.exc_info[1]))


_NOT_FULL = _NotFull()


def silence_full_disks() -> None:
    """Keep threads and libraries from reporting what the caller is told as an error.

    A full disk fails many writes at a time, each with a traceback of its own, some of
    them when the process ends.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_NOT_FULL)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    if not isinstance(threading.excepthook, _Hook):
        threading.excepthook = _Hook(threading.excepthook)


class _Hook:
    """A hook that passes all errors on but those of a full disk.

    Args:
      report: the hook there was.
    """

    def __init__(self, report: Any):
        self._report = report

    def __call__(self, unraised: Any) -> None:
        """Report an error that nobody caught."""
        given_up = str(unraised.exc_value) == "Event loop is closed"
        if not (given_up or is_full(unraised.exc_value)):
            self._report(unraised)
