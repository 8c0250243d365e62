"""The wheel, built and used in an empty environment, far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import tsd_jax

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", name="wheel")
def _wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, since setuptools leaves a build folder behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("tsd_jax", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, "."]
    subprocess.run(command, cwd=source, check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module", name="run")
def _run(wheel, tmp_path_factory) -> Run:
    """Install the wheel with all it asks for; return a way to run its commands."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    binaries = folder / "bin"
    subprocess.run([binaries / "pip", "install", "-q", wheel], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binaries / name, *map(str, arguments)],
            cwd=elsewhere,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_wheel_holds_the_demo_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "tsd_jax/configs/default.py" in names
    assert "tsd_jax/demo/assets/model/model.safetensors" in names
    assert "tsd_jax/demo/assets/task/train.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tsd_jax"}


def test_it_imports_away_from_the_checkout(run):
    code = "import tsd_jax; print(tsd_jax.__version__, tsd_jax.__file__)"
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert version == tsd_jax.__version__
    assert ROOT not in Path(file).parents


def test_the_demo_learns_and_its_runs_are_compared_and_exported(run, tmp_path):
    done = run("tsd-demo", "--workdir", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "demo/tsd/summary.json").read_text())
    assert summary["after"]["accuracy"] > 0.9 > 0.4 > summary["before"]["accuracy"]
    compared = run("tsd-compare", tmp_path / "demo/tsd", tmp_path / "demo/lora")
    assert compared.returncode == 0, compared.stderr
    assert {"tsd", "lora"} <= {
        line.split()[0] for line in compared.stdout.split("\n")[2:4]
    }
    out = tmp_path / "peft"
    exported = run("tsd-export", tmp_path / "demo/tsd", "--to", "peft", "--out", out)
    assert exported.returncode == 0, exported.stderr
    assert (out / "adapter_model.safetensors").is_file()


def test_commands_refuse_bad_input_in_one_line(run, tmp_path):
    cases = [
        ("tsd-train", "--config", "nowhere.py", "--workdir", tmp_path / "run"),
        ("tsd-export", tmp_path, "--to", "peft", "--out", tmp_path / "out"),
        ("tsd-compare", tmp_path),
    ]
    for command in cases:
        done = run(*command)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_config_of_the_users_own_starts_from_the_packaged_defaults(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import default\n\n\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.model.path = 'nowhere'\n"
        "    config.data.path = 'nowhere.json'\n"
        "    return config\n"
    )
    done = run("tsd-train", "--config", file, "--dry-run")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
