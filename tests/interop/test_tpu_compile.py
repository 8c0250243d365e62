"""What a TPU pod runs for a launch, compiled for a v5e:4x4 slice without having one."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.tpu_programs import RANK, SPREADS, STACKS

ROOT = Path(__file__).resolve().parents[2]
ASIDE = Path(sys.prefix) / "libtpu"  # where `make test-interop` puts it
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}


class Program(NamedTuple):
    """A program as lowered and as compiled, and the bytes each device needs."""

    lowered: str
    compiled: str
    seconds: float
    output: int
    temporary: int


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Program]:
    if not (ASIDE.is_dir() or importlib.util.find_spec("libtpu")):
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            pytest.fail("libtpu is not installed: `make test-interop` does it")
        pytest.skip("libtpu is built for Linux on x86_64 alone")
    folder = tmp_path_factory.mktemp("programs")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    paths = [str(ASIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.tpu_programs", str(folder)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    return {
        name: Program(
            (folder / f"{name}.mlir").read_text(),
            (folder / f"{name}.hlo").read_text(),
            cost["seconds"],
            cost["output"],
            cost["temporary"],
        )
        for name, cost in figures.items()
    } | {"step after": Program((folder / "step after.mlir").read_text(), "", 0, 0, 0)}


DECOMPOSITION = re.compile(
    r"^_?(eigh|svd|qdwh|qr|polar|householder|compactwy|cholesky|lapack|jacobi)",
    re.IGNORECASE,
)


def decompositions(program: Program) -> set[str]:
    """Name what decomposes: called kernels, and the functions of JAX that loop."""
    called = re.findall(r'custom_call_target="([^"]*)"', program.compiled)
    traced = re.findall(r'op_name="([^"]*)"', program.compiled)
    parts = {part for name in traced for part in re.findall(r"[\w.]+", name)}
    return {name for name in {*called, *parts} if DECOMPOSITION.search(name)}


def loops(program: Program) -> list[str]:
    """Name the loops of a program by where they were traced."""
    lines = [line for line in program.compiled.splitlines() if " while(" in line]
    found = [re.search(r'op_name="([^"]*)"', line) for line in lines]
    return [name[1] if name else "?" for name in found]


def gathered(program: Program) -> Iterator[int]:
    """Return the bytes of every array that a collective makes whole on each device."""
    pattern = r"= ([^=]*) (?:all-gather|all-reduce|collective-broadcast)(?:-start)?\("
    for results in re.findall(pattern, program.compiled):
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", results):
            sizes = [int(size) for size in dims.split(",") if size]
            yield BYTES[kind] * math.prod(sizes)


def test_what_must_not_be_there_is_found_where_it_is(programs):
    """The same eyes on an SVD, float64 and a stack moved without care."""
    assert "EighTpu" in decompositions(programs["control eigh"])
    assert {"qdwh", "QrDecompositionBlock"} <= decompositions(programs["control svd"])
    assert any("qdwh" in name for name in loops(programs["control svd"]))
    assert "f64" in programs["control float64"].lowered
    layer = 2 * 4096 * 4096
    assert max(gathered(programs["control gather"])) > 16 * layer
    assert programs["control gather"].temporary > 32 * layer


@pytest.mark.parametrize(
    ("stack", "mesh"), SPREADS, ids=[" on ".join(pair) for pair in SPREADS]
)
def test_a_launch_decomposes_and_gathers_nothing_on_the_pod(programs, stack, mesh):
    """At LLaMA-7B's shapes: spreading a chunk, and joining what the hosts found.

    Beside the chunk itself a device holds two more while two mesh axes are exchanged:
    one sent, one received.
    """
    _, fan_in, fan_out = STACKS[stack]
    kernel = 2 * fan_in * fan_out
    chunk = kernel * max(1, 2**26 // kernel)
    factor = 4 * 32 * RANK * max(fan_in, fan_out)
    spread, join = (programs[f"{what} {stack}, {mesh}"] for what in ("spread", "join"))
    for program in (spread, join):
        assert decompositions(program) == set()
        assert loops(program) == []
        assert "f64" not in program.lowered
    assert max(gathered(spread)) < 1024
    assert max(gathered(join)) <= factor < kernel
    assert chunk <= spread.output < chunk + 2**20
    assert spread.temporary < 3 * chunk
    assert join.output + join.temporary < 6 * factor
    assert spread.seconds < 60


def test_one_step_serves_the_whole_run(programs):
    """After launch the same program is asked for, and it holds nothing of a launch."""
    before = programs["step before"]
    assert before.lowered == programs["step after"].lowered
    assert decompositions(before) == set()
    assert "f64" not in before.lowered
    # The micro-batches, and the layers forward and backward.
    where = sorted(name.split("/")[-2] for name in loops(before))
    assert where == ["Decoder.run_layers", "Decoder.run_layers", "jit(train_step)"]
    assert max(gathered(before)) < 8 * 2 * 256 * 256  # less than a stack of kernels
