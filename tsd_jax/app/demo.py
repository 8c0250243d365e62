"""Run the embedded demo: LoRA-TSD and plain LoRA teach a tiny model a new task.

    tsd-demo [--workdir runs/demo]

Two trainings of under a minute each on two CPU cores, and a table of what they
reached. Model and data are part of the package. Exit code 2 means bad input.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tsd_jax.app.command_line import Parser, provide_configs
from tsd_jax.app.compare import compare
from tsd_jax.app.config import settings_from
from tsd_jax.app.settings import Settings
from tsd_jax.core.errors import InputError

METHODS = ("tsd", "lora")


def demo_settings(method: str, assets: Path) -> Settings:
    """Return the settings of configs/demo.py for a method.

    Args:
      method: its name.
      assets: folder of the demo's model and data.
    """
    provide_configs()
    config = importlib.import_module("configs.demo").get_config().to_dict()
    config["method"]["name"] = method
    config["model"]["path"] = str(assets / "model")
    config["data"]["path"] = str(assets / "task" / "train.json")
    config["data"]["eval_path"] = str(assets / "task" / "test.json")
    return settings_from(config)


def demo(workdir: Path) -> int:
    """Train by each method and print the comparison; return the exit code."""
    from tsd_jax.app.run import run

    assets = importlib.resources.files("tsd_jax.demo") / "assets"
    with importlib.resources.as_file(assets) as folder:
        for method in METHODS:
            print(f"\n{method}", flush=True)
            code = run(demo_settings(method, folder), workdir / method)
            if code:
                return code
    print(f"\n{compare([workdir / method for method in METHODS])}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(
        prog="tsd-demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--workdir",
        type=Path,
        default=Path("runs/demo"),
        help="folder of the two runs (runs/demo)",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no word about torch
    try:
        return demo(parser().parse_args(argv).workdir)
    except InputError as error:
        print(f"tsd-demo: error: {error}", file=sys.stderr)
        return 2


def cli() -> None:
    """Run as the command `tsd-demo`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    cli()
