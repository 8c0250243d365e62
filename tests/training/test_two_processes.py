"""A launch shared by two processes, over real collectives on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.two_processes import MODEL, problem
from tsd_jax.core.adapter import delta
from tsd_jax.extraction.launch import launch
from tsd_jax.huggingface import abstract_params, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Run both processes; give what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = str(tmp_path_factory.mktemp("spectra"))
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape),
        abstract_params(MODEL),
    )
    write_checkpoint(Path(folder) / "model", MODEL, params, dtype="float32")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.two_processes", port, n, folder],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in "01"
    ]
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = "\n".join(error[-2000:] for _, error in ended)
    assert [process.returncode for process in processes] == [0, 0], errors
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_both_see_what_one_process_sees(said):
    spec, kernel, trainable = problem()
    new, frozen, report = launch({"k": jnp.asarray(kernel)}, trainable, spec)
    change = jax.jit(delta)(new.adapters["k"], frozen["k"])
    leaves = (report["k"].indices, report["k"].sigma, new.adapters["k"].a, change)
    want = [np.abs(np.asarray(leaf)).sum(axis=0).reshape(-1) for leaf in leaves]
    for process in said:
        for way, got in {**process["results"], "again": process["again"]}.items():
            for x, y in zip(got, want, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=way)


def test_each_keeps_the_spectra_of_its_own_layers(said):
    """Five layers in chunks of four over four devices; the last one is repeated."""
    assert [process["kept"] for process in said] == [3, 3]


def test_each_reads_its_own_devices_parts_of_a_checkpoint(said):
    """Kernels over fsdp x tensor: each process has half of every one, as one row."""
    norms = 8 + 2 * 2 * 8
    kernels = 2 * (4 * 8 * 8 + 3 * 8 * 24) + 2 * 16 * 8
    assert [process["read"] for process in said] == [kernels // 2 + norms] * 2
