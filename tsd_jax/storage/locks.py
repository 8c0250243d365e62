"""One run at a time in a workdir, by a lock that ends with its process."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tsd_jax.core.errors import InputError

LOCK = ".lock"
"""The locked file in a workdir; it says who holds it."""

# What file systems and platforms without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[bool]:
    """Hold a workdir for one run, which is made if it does not exist.

    The operating system drops the lock when the process ends, however it ends. A
    workdir that was made and stays empty is removed again.

    Args:
      workdir: of the run.

    Yields:
      Whether it is locked; False where the file system has no locks, so that a second
      run would not be noticed.

    Raises:
      InputError: another run holds it, or it cannot be written to.
    """
    made = [each for each in (workdir, *workdir.parents) if not os.path.exists(each)]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"workdir {workdir} cannot be written to ({error.strerror}): give another "
            "--workdir, or the right to write there"
        ) from None
    with os.fdopen(descriptor, "r+b", buffering=0):
        locked = _lock(descriptor, workdir)
        try:
            yield locked
        finally:
            if made and [each.name for each in workdir.iterdir()] == [LOCK]:
                (workdir / LOCK).unlink()
                _remove_empty(made)


def _lock(descriptor: int, workdir: Path) -> bool:
    """Lock an open file and sign it; return False where there are no locks."""
    try:
        import fcntl  # Windows has none

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that made the folder and left it empty has removed the file since.
        gone = not os.fstat(descriptor).st_nlink
    except ModuleNotFoundError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        gone = True
    if gone:
        raise InputError(
            f"workdir {workdir} is in use by another run{_holder(descriptor)}: wait "
            "until it has ended, or give another --workdir"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0
    )
    return True


def _holder(descriptor: int) -> str:
    """Return who has signed the lock, in brackets."""
    signed = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return f" ({signed})" if signed else ""


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
