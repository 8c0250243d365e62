"""One run at a time: other processes are refused, dead ones and their files are not."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.storage.locks import LOCK, held

HOLD = """
import sys, time
from pathlib import Path
from tsd_jax.storage.locks import held
with held(Path(sys.argv[1])) as locked:
    print(locked, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    workdir = tmp_path / "a" / "run"
    arguments = [sys.executable, "-c", HOLD, str(workdir)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "True\n"
        told = rf"run is in use by another run \(process {first.pid} on .*\): wait"
        with pytest.raises(InputError, match=told), held(workdir):
            pass
        first.kill()
    assert (workdir / LOCK).exists(), "what a killed run leaves"
    with held(workdir) as locked:
        assert locked


def test_a_lock_in_this_process_holds_as_well(tmp_path):
    with held(tmp_path):
        with pytest.raises(InputError, match="in use by another run"), held(tmp_path):
            pass
        assert (tmp_path / LOCK).exists(), "the second one takes nothing away"
    with held(tmp_path) as locked:
        assert locked


def test_a_workdir_that_stays_empty_is_removed_and_no_other(tmp_path):
    with held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with held(tmp_path / "old"):
        pass
    with held(tmp_path / "new"):
        (tmp_path / "new" / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_where_there_are_no_locks_a_run_goes_on_unlocked(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, "none")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path) as locked, held(tmp_path) as second:
        assert (locked, second) == (False, False)


@pytest.mark.parametrize("blocked", ["mkdir", "open"])
def test_a_workdir_that_cannot_be_written_to(tmp_path, monkeypatch, blocked):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if blocked == "mkdir":
        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    else:
        monkeypatch.setattr(os, "open", refuse)
    told = r"run cannot be written to \(Permission denied\): give another --workdir"
    with pytest.raises(InputError, match=told), held(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
