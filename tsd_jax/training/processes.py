"""Several processes as one run: they connect, and fail and stop together.

JAX's processes meet in collectives: one that exits early would leave the others waiting
for it. So a process that exits reports why through the coordination service of
`jax.distributed`, and a thread of every other process listens.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsd_jax.core.errors import InputError

_FAILED, _LEFT = "tsd_jax/failed", "tsd_jax/left"
_POLL = 0.5  # seconds
_PATIENCE = 10.0  # seconds the first process, which runs the service, waits at the end
_leaving = threading.Lock()


def connect(
    coordinator: str | None = None,
    processes: int | None = None,
    number: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Join the run's other processes; call it before any device is used.

    Missing arguments are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; where those are not set, JAX detects TPU pods, Slurm, Open MPI and
    Kubernetes.

    Args:
      coordinator: HOST:PORT of the first process.
      processes: number of processes.
      number: index of this process, from 0.
      timeout: seconds to wait for the others; then this process exits with code 2.

    Raises:
      InputError: there is no such run to join.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _from_environment("JAX_NUM_PROCESSES", processes)
    number = _from_environment("JAX_PROCESS_ID", number)
    _check(coordinator, processes, number)
    # JAX aborts the process after its own timeout; this fires just before.
    late = threading.Timer(
        timeout,
        _leave_now,
        [2, f"the other processes did not connect within {timeout} s", None],
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, number, initialization_timeout=timeout + 60
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"cannot join a distributed run ({reason}): give --coordinator HOST:PORT, "
            "--processes and --process-id"
        ) from None
    finally:
        late.cancel()
    if not is_single_process():
        _listen()


def _from_environment(name: str, given: int | None) -> int | None:
    """Return a whole number, from the environment where it is not given."""
    if given is not None or not os.environ.get(name):
        return given
    try:
        return int(os.environ[name])
    except ValueError:
        raise InputError(
            f"{name}={os.environ[name]!r} in the environment is not a whole number"
        ) from None


def _check(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Refuse arguments that JAX would only reject after a long wait."""
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 2**16):
            raise InputError(f"coordinator {coordinator!r} must be HOST:PORT")
    if processes is not None and processes < 1:
        raise InputError(f"the number of processes must be positive, not {processes}")
    if number is not None and not 0 <= number < (processes or number + 1):
        raise InputError(
            f"process {number} is not one of {processes}: they are numbered from 0"
        )


def _service() -> Any:
    """Return the client of the coordination service; None in a run of one process."""
    from jax._src import distributed  # no public name; Orbax imports it from here too

    return distributed.global_state.client


def is_single_process() -> bool:
    """Return whether this run has one process, without starting a device."""
    return _service() is None or jax.process_count() == 1


def _listen() -> None:
    """Exit this process when another one reports that it has failed."""
    service, ended = _service(), threading.Event()

    def listen() -> None:
        while not ended.wait(_POLL):
            _follow(service)

    atexit.register(ended.set)  # before JAX's own, which closes the service
    threading.Thread(target=listen, daemon=True).start()


def _follow(service: Any) -> None:
    """Exit as another process did, if one has reported so."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        report = json.loads(service.key_value_try_get(_FAILED))
        if report["process"] != jax.process_index():
            reason = f"process {report['process']}: {report['reason']}"
            _leave_now(report["code"], reason, service)


def exit_run(code: int, reason: str, details: str = "") -> int:
    """Print why this process exits and make all others exit; return the exit code.

    Returns only in a run of one process. With several, nothing is cleaned up, since
    other threads may wait in a collective.

    Args:
      code: exit code.
      reason: reason in one line.
      details: text printed before it, unless this process only follows another one.
    """
    service = _service()
    if service is None or is_single_process():
        print(_line(code, reason), file=sys.stderr)
        return code
    report = {"process": jax.process_index(), "code": code, "reason": reason}
    try:
        service.key_value_set(_FAILED, json.dumps(report))
    except jax.errors.JaxRuntimeError:
        # Another process failed first, which may be why this one did.
        _follow(service)
    _leave_now(code, reason, service)
    return code


def _line(code: int, reason: str) -> str:
    program = os.path.basename(sys.argv[0])
    return f"{program}: {'error: ' * (code in (1, 2))}{reason}"


def _leave_now(code: int, reason: str, service: Any) -> None:
    """Print why and exit; the first process, which runs the service, exits last."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end the process
    print(_line(code, reason), file=sys.stderr, flush=True)
    sys.stdout.flush()
    if service is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if jax.process_index() == 0:
                for number in range(1, jax.process_count()):
                    service.blocking_key_value_get(
                        f"{_LEFT}/{number}", int(1000 * _PATIENCE)
                    )
            else:
                service.key_value_set(f"{_LEFT}/{jax.process_index()}", "")
    os._exit(code)


def broadcast_flag(flag: bool) -> bool:
    """Return the first process's flag, in every process.

    Args:
      flag: the flag as this process has it.
    """
    if is_single_process():
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def wait_for_all(name: str) -> None:
    """Wait until every process gets here.

    Args:
      name: name of this place in the program.
    """
    if not is_single_process():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does.

    JAX takes the signal over where there are several processes.
    """

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yield a function (steps done) -> whether SIGINT or SIGTERM asked to stop here.

    With several processes it must be called after every step, and returns True in all
    of them after the same step, whichever received the signal. A second signal raises
    KeyboardInterrupt.
    """
    seen: list[int] = []
    several = not is_single_process()
    # JAX listens to SIGTERM itself where there are several processes.
    names = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        del frame
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(done: int) -> bool:
        if several:
            return multihost_utils.reached_preemption_sync_point(done)
        return bool(seen)

    old = [signal.signal(name, note) for name in names]
    try:
        yield asked
    finally:
        for name, handler in zip(names, old, strict=True):
            signal.signal(name, handler)
