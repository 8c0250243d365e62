from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import types

import pytest

from tsd_jax.storage.disk import is_full, silence_full_disks

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(error, *, cause):
    try:
        try:
            raise error
        except OSError as inner:
            raise ValueError("cannot save") from (inner if cause else None)
    except ValueError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        wrapped(FULL, cause=True),
        wrapped(FULL, cause=False),
        ValueError('RESOURCE_EXHAUSTED: Failed writing "a": No space left on device'),
    ],
    ids=["full", "quota", "cause", "context", "words"],
)
def test_a_full_disk_is_found(error):
    assert is_full(error)


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "broken"), ValueError("x")])
def test_other_errors_are_not_a_full_disk(error):
    assert not is_full(error)


@pytest.fixture
def told(monkeypatch):
    """Keep what hooks and loggers are told; leave them as they were."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    monkeypatch.setattr(threading, "excepthook", seen.append)
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [(logger, [*logger.filters]) for logger in loggers]
    yield seen
    for logger, filters in before:
        logger.filters[:] = filters


def test_threads_are_silent_about_full_disks_alone(told, caplog):
    silence_full_disks()
    silence_full_disks()  # once is enough
    errors = (FULL, RuntimeError("Event loop is closed"), ValueError("other"))
    for error in errors:
        report = types.SimpleNamespace(exc_value=error)
        sys.unraisablehook(report)  # type: ignore[arg-type]
        threading.excepthook(report)  # type: ignore[arg-type]
    assert [report.exc_value for report in told] == [errors[2]] * 2
    for name in ("absl", "asyncio"):
        for error in (FULL, errors[2]):
            logging.getLogger(name).error("failed", exc_info=error)
    assert [r.exc_info[1] for r in caplog.records] == [errors[2]] * 2
