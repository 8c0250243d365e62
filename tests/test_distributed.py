"""`train.py --distributed`: two processes on this machine are one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tsd_jax.storage import locks

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SMALL = {
    "adapter.pattern": "layers/.*/q_proj/kernel",
    "adapter.rank": 4,
    "eval.limit": 8,
    "eval.batch_size": 8,
    "train.batch_size": 8,
    "train.micro_batches": 2,
    "train.log_every": 1,
}
DECIDES = {
    "mesh": "(2,2,1)",
    "method.auto_launch": True,
    "auto_launch.launch_min": 3,
    "auto_launch.launch_max": 6,
    "auto_launch.every": 1,
    "auto_launch.patience": 2,
    "auto_launch.threshold": 0.5,
    "adapter.auto_directions": True,
    "adapter.dropout": 0.1,
    "cache_spectra": True,
    "train.steps": 20,
}
GRADIENT = {
    "mesh": "(1,1,4)",
    "method.discovery": "gradient",
    "method.discovery_batches": 2,
    "method.launch_step": 0,
    "train.steps": 3,
}


def command(workdir: Path, settings: dict[str, Any], *more: str) -> list[str]:
    folder = workdir.with_name(f"{workdir.name}-cache")
    keys = {**SMALL, "cache_dir": folder, **settings}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    run = ["train.py", "--config=configs/demo.py", f"--workdir={workdir}"]
    return [sys.executable, *run, *flags, *more]


def start(arguments: list[str], devices: int, **more: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**kept, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_pair(*each: list[str]) -> list[subprocess.Popen[str]]:
    """Start one process by flags, the other one by the environment's names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator={place}", "--processes=2", "--process-id=0"]
    names = {
        "JAX_COORDINATOR_ADDRESS": place,
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    first, second = ([*arguments, "--distributed"] for arguments in each)
    return [start([*first, *flags], 2), start(second, 2, **names)]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all; return exit code, output and what of errors is ours."""
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    ours = [[x for x in err.splitlines() if "train.py" in x] for _, err in said]
    return [
        (process.returncode, out, "\n".join(lines))
        for process, (out, _), lines in zip(processes, said, ours, strict=True)
    ]


def succeed(processes: list[subprocess.Popen[str]]) -> list[str]:
    ended = end(processes)
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    return [out for _, out, _ in ended]


def rows(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(many: Path, one: Path) -> None:
    """The same figures at the same steps, the same directions and adapter."""
    timed = ("tokens_per_second", "extract_seconds")
    for got, want in zip(rows(many), rows(one), strict=True):
        assert got.keys() == want.keys()
        for key in want.keys() - {*timed}:
            if isinstance(want[key], float):
                assert got[key] == pytest.approx(want[key], rel=1e-3), (key, got)
            else:
                assert got[key] == want[key], (key, got)
    with np.load(many / "directions.npz") as got, np.load(one / "directions.npz") as x:
        assert got.files == x.files
        for name in got.files:
            np.testing.assert_allclose(got[name], x[name], rtol=2e-2, atol=1e-6)
            if got[name].dtype == np.int32:
                np.testing.assert_array_equal(got[name], x[name])
    name = "adapter/adapter_model.safetensors"
    got, want = load_file(many / name), load_file(one / name)
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-2, atol=1e-4)


def test_a_run_that_was_stopped_goes_on_and_equals_that_of_one_process(tmp_path):
    """With all that decides for itself; a signal to one process ends both."""
    many, one = tmp_path / "many", tmp_path / "one"
    pair = start_pair(*[command(many, DECIDES)] * 2)
    assert pair[0].stdout is not None
    for line in pair[0].stdout:
        if "launch: ranking directions" in line:
            break
    pair[1].send_signal(signal.SIGTERM)
    ended = end(pair)
    assert [code for code, _, _ in ended] == [130, 130], ended
    assert all("stopped by a signal after step" in said for _, _, said in ended)
    stopped = max(row["step"] for row in rows(many))
    assert stopped < 20
    first, other = succeed(start_pair(*[command(many, DECIDES)] * 2))
    assert f"step {stopped + 1:>6}" in first
    assert f"step {stopped:>6}" not in first
    assert "step" not in other.replace("steps", ""), "the first alone speaks"
    succeed([start(command(one, DECIDES), 4)])
    assert_same_run(many, one)
    summary = json.loads((many / "summary.json").read_text())
    assert 3 <= summary["launch_step"] <= 6
    kept = [
        sorted(path.name for path in (tmp_path / f"{name}-cache/spectra").iterdir())
        for name in ("many", "one")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4, "one for each layer, whoever computed it"
    succeed(start_pair(*[command(many, DECIDES)] * 2))  # a finished run: nothing to do
    assert_same_run(many, one)


def test_directions_from_the_gradient_equal_those_of_one_process(tmp_path):
    """On a mesh whose batch is not cut: both processes need all of it."""
    succeed(start_pair(*[command(tmp_path / "many", GRADIENT)] * 2))
    succeed([start(command(tmp_path / "one", GRADIENT), 4)])
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_one_that_fails_does_not_let_the_other_wait(tmp_path):
    """Bad input on one host, and a workdir that is not shared."""
    settings = {**GRADIENT, "data.path": "nowhere.json"}
    good, bad = command(tmp_path / "run", GRADIENT), command(tmp_path / "run", settings)
    ended = end(start_pair(good, bad))
    assert [code for code, _, _ in ended] == [2, 2], ended
    reason = "data file nowhere.json does not exist; check the path"
    assert ended[0][2] == f"train.py: error: process 1: {reason}"
    assert ended[1][2] == f"train.py: error: {reason}"
    # Told to leave at once, the first process leaves its lock; nobody holds it.
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {locks.LOCK}
    ended = end(start_pair(good, command(tmp_path / "other", GRADIENT)))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "is not the first process's folder here" in ended[1][2]
    assert ended[0][2].startswith("train.py: error: process 1: workdir")
