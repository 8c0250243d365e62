"""What the command lines need beside flags: config files, and faults in arguments."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tsd_jax.app.config import unknown_key
from tsd_jax.core.errors import InputError


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError on bad arguments, rather than exit."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's message."""
        raise InputError(message)


def provide_configs() -> None:
    """Make `from configs import default` work in config files, wherever they lie.

    A checkout has the package `configs`; an installed tsd_jax carries it as
    `tsd_jax.configs`, which then stands in under that name.
    """
    if _exists("configs.default"):  # any folder of that name passes for `configs`
        return
    if _exists("tsd_jax.configs.default"):
        sys.modules["configs"] = importlib.import_module("tsd_jax.configs")


def _exists(module: str) -> bool:
    """Return whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def load_config(file: str) -> dict[str, Any]:
    """Return the config of a file's get_config(), as plain values.

    Raises:
      InputError: the file does not exist, or cannot be run.
    """
    if not Path(file).is_file():
        raise InputError(f"config file {file} does not exist; see configs/")
    provide_configs()
    try:
        return runpy.run_path(file)["get_config"]().to_dict()
    except Exception as error:  # whatever a config file may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"config file {file} cannot be loaded ({reason})") from None


def config_file_in(argv: Sequence[str]) -> str:
    """Return the config file that is named among the arguments.

    Raises:
      InputError: none is.
    """
    found = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            found = value if equals else following
    if found is None:
        raise InputError("give a config: --config configs/demo.py")
    return found


def check_overrides(argv: Sequence[str], known: list[str]) -> None:
    """Raise InputError where a --config.KEY names a key that the config lacks.

    Args:
      argv: the command line.
      known: the keys there are.
    """
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        key = name.removeprefix("config.")
        if argument.startswith("-") and key != name and key not in known:
            raise unknown_key(key, known)
