from __future__ import annotations

import subprocess
import sys

import pytest

from configs import demo
from tests.helpers.demo_runs import ROOT
from tsd_jax.app import command_line
from tsd_jax.app.config import keys
from tsd_jax.core.errors import InputError


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "a.py"],
        ["--config=a.py", "--dry-run"],
        ["-config", "a.py"],
        ["--config=b.py", "--config.train.steps=3", "--config=a.py"],  # the last holds
    ],
)
def test_the_config_file_is_found_among_the_arguments(argv):
    assert command_line.config_file_in(["program", *argv]) == "a.py"


@pytest.mark.parametrize("argv", [[], ["config=a.py"], ["--config.model.path=a.py"]])
def test_without_a_config_file_there_is_nothing_to_run(argv):
    with pytest.raises(InputError, match=r"give a config: --config configs/demo\.py"):
        command_line.config_file_in(["program", *argv])


def test_a_config_file_is_run_for_its_values():
    found = command_line.load_config(str(ROOT / "configs/demo.py"))
    assert found == demo.get_config().to_dict()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config():\n  return 1", "AttributeError: .*to_dict"),
        ("def get_config(:", "SyntaxError: "),
    ],
)
def test_a_config_file_that_cannot_be_run_gets_one_line(text, reason, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"mine\.py cannot be loaded \({reason}") as e:
        command_line.load_config(str(file))
    assert "\n" not in str(e.value)


def test_a_config_file_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"config file none\.py does not exist"):
        command_line.load_config("none.py")


def test_an_unknown_key_is_refused_with_the_nearest():
    command_line.check_overrides(["program", "--config.train.steps=3"], keys())
    with pytest.raises(InputError, match=r"did you mean 'train\.steps'\?"):
        command_line.check_overrides(["program", "--config.train.step=3"], keys())


def test_an_old_key_is_refused_with_its_new_name():
    old = ["program", "--config.settling.every", "3"]
    with pytest.raises(
        InputError, match=r"'settling\.every' is now 'auto_launch\.every'"
    ):
        command_line.check_overrides(old, keys())


def test_a_parser_raises_rather_than_exits():
    parser = command_line.Parser(prog="some")
    parser.add_argument("--count", type=int)
    with pytest.raises(InputError, match="invalid int value: 'x'"):
        parser.parse_args(["--count", "x"])


PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if path not in ("", {root!r})]
sys.path.append({folder!r})
from tsd_jax.app import command_line
found = command_line.load_config({file!r})
print(found["train"]["steps"], sys.modules["configs"].__name__)
"""


def test_installed_configs_stand_in_where_there_is_no_checkout(tmp_path):
    """The package as a wheel lays it, run beside a folder that is named `configs`."""
    package = tmp_path / "site" / "tsd_jax"
    package.parent.mkdir()
    package.mkdir()
    for source in (ROOT / "tsd_jax").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (package / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "site" / "configs").mkdir()
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import default\n\n\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.train.steps = 7\n"
        "    return config\n"
    )
    program = PROGRAM.format(root=str(ROOT), folder=str(package.parent), file=str(file))
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["7", "tsd_jax.configs"], done.stderr
