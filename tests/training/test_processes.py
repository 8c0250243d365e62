from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.training import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host", 2, 0), "coordinator 'host' must be HOST:PORT"),
        (("host:ninety", 2, 0), "coordinator 'host:ninety' must be HOST:PORT"),
        (("host:70000", 2, 0), "must be HOST:PORT"),
        (("host:1", 0, 0), "number of processes must be positive, not 0"),
        (("host:1", 2, 2), "process 2 is not one of 2: they are numbered from 0"),
        (("host:1", 2, -1), "process -1 is not one of 2"),
    ],
)
def test_what_is_no_run_of_several_processes(given, message):
    """Refused at once, where JAX would wait for the others."""
    with pytest.raises(InputError, match=message):
        processes.connect(*given)


def test_the_environment_is_read_where_nothing_is_given(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='two' in the env"):
        processes.connect()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "5")
    with pytest.raises(InputError, match="process 5 is not one of 2"):
        processes.connect()
    with pytest.raises(InputError, match="process 7 is not one of 3"):
        processes.connect(None, 3, 7)


def test_who_waits_in_vain_ends_with_one_line():
    """Before JAX would abort it: the first process, whose others never come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    waiting = f"connect({place!r}, 2, 0, timeout=1)"
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            f"from tsd_jax.training.processes import connect; {waiting}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line == "-c: error: the other processes did not connect within 1 s"


def test_a_run_of_one_process_ends_as_it_likes(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    assert processes.exit_run(2, "no data") == 2
    assert capsys.readouterr().err == "train.py: error: no data\n"
    assert processes.is_single_process()
    assert processes.broadcast_flag(True)
    assert not processes.broadcast_flag(False)


def test_sigterm_interrupts_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), processes.interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_are_given_back():
    """A second signal does not wait for the step in hand."""
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with processes.stop_signals() as asked:
        assert not asked(1)
        signal.raise_signal(signal.SIGTERM)
        assert asked(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    now = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert now == old
