"""The command line: exit codes, one line for bad input, nothing loaded too early."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.demo_runs import ROOT


def command(*arguments, program=("train.py",)):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


DEMO = "--config=configs/demo.py"
BAD = {
    "an unknown key": (
        (DEMO, "--config.optimizer.learning_rte=1e-3"),
        r"no key 'optimizer.learning_rte'; did you mean 'optimizer.learning_rate'\?",
    ),
    "an old key": (
        (DEMO, "--config.adapter.train_whole=norm"),
        r"'adapter\.train_whole' is now 'adapter\.full_params'",
    ),
    "a wrong type": ((DEMO, "--config.train.steps=many"), r"config\.train\.steps=many"),
    "no config": ((), r"give a config"),
    "no such config": (("--config", "none.py"), r"none\.py does not exist"),
    "an argument without a flag": ((DEMO, "more"), r"unexpected argument 'more'"),
    "an unknown flag": ((DEMO, "--speed=3"), r"Unknown command line flag 'speed'"),
    "processes that are not asked for": (
        (DEMO, "--processes=2"),
        r"--process-id need --distributed",
    ),
    "settings that do not go together": (
        (DEMO, "--config.model.quantization=nf4"),
        r"without model\.remat=True",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_code_2_and_one_line(case, tmp_path):
    arguments, message = BAD[case]
    done = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.py: error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_folder():
    done = command(DEMO)
    assert done.returncode == 2
    assert "give a folder for the run: --workdir runs/NAME" in done.stderr


def test_an_old_key_in_a_config_file_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import demo\n\n\n"
        "def get_config():\n"
        "    config = demo.get_config()\n"
        "    config.adapter.train_whole = 'norm/scale'\n"
        "    return config\n"
    )
    done = command(f"--config={file}", "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("'adapter.train_whole' is now 'adapter.full_params'")


def test_dry_run_prints_the_plan_and_stops(tmp_path):
    done = command(
        DEMO, f"--workdir={tmp_path / 'r'}", "--dry-run", "--config.adapter.dora=True"
    )
    assert done.returncode == 0, done.stderr
    assert "method tsd on DoRA, launch after step 24" in done.stdout
    assert re.search(r"layers/mlp/up_proj/kernel +4x96x256 +0 \| 1 \| 2", done.stdout)
    assert "trainable" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "code"), [(("--help",), 0), ((DEMO, "--config.train.steps=0"), 2)]
)
def test_help_and_bad_settings_load_nothing_heavy(arguments, code):
    program = (
        "import sys\n"
        "from tsd_jax.app.train import main\n"
        "code = main(sys.argv)\n"
        "heavy = {'orbax', 'transformers', 'tensorboardX', 'matplotlib'}\n"
        "print(code, sorted(heavy & sys.modules.keys()))\n"
    )
    done = command("--dry-run", *arguments, program=("-c", program))
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr


STOPPED = """
import os, signal, sys, time
from tsd_jax.app import run
def load_weights(*_):
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
run.load_weights = load_weights
from tsd_jax.app.train import main
sys.exit(main(sys.argv))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_weights_load_is_one_line(tmp_path, name):
    program = ("-c", STOPPED.format(name=name))
    done = command(DEMO, f"--workdir={tmp_path / 'run'}", program=program)
    assert done.returncode == 130, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "stopped by a signal; the same command goes on from" in line
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(tmp_path):
    """Whichever file it was; checkpoints have a test of their own."""
    full = "raise OSError(28, 'No space left on device')"
    program = (
        "import sys\n"
        "from tsd_jax.app import run\n"
        f"def write_config(*_): {full}\n"
        "run.write_config = write_config\n"
        "from tsd_jax.app.train import main\n"
        "sys.exit(main(sys.argv))\n"
    )
    done = command(DEMO, f"--workdir={tmp_path / 'run'}", program=("-c", program))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "no space left on the disk: make room" in line


def test_help_tells_the_flags():
    done = command("--help")
    assert done.returncode == 0
    for flag in ("config", "workdir", "dry-run", "distributed", "coordinator"):
        assert f"{flag}:" in done.stdout
