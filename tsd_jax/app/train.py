"""Fine-tune a decoder or an encoder with LoRA, LoRA-Dash, LoRA-Init or LoRA-TSD.

    tsd-train --config configs/demo.py --workdir runs/demo
    tsd-train --config configs/llama_tsd.py --config.model.path=FOLDER --dry-run

In a checkout, `python train.py` is the same command. Started again with the same
workdir, a run resumes from its last checkpoint. Exit code 2 means bad input, 130 that a
signal stopped it.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from tsd_jax.app import command_line, config
from tsd_jax.core.errors import InputError
from tsd_jax.storage.disk import is_full
from tsd_jax.training import processes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a config file, such as those of configs/"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; created, or resumed from"
)
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "print what would be trained, and stop")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other processes of a run: see the next three"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first process, or JAX_COORDINATOR_ADDRESS"
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "number of processes, or JAX_NUM_PROCESSES"
)
_PROCESS_ID = flags.DEFINE_integer(
    "process-id", None, "which of them this is, from 0, or JAX_PROCESS_ID"
)

_INTERRUPTED = (
    "stopped by a signal; the same command goes on from the last checkpoint, or starts "
    "again"
)
_FULL = (
    "no space left on the disk: make room, and the same command resumes from the last "
    "checkpoint"
)


def parse(argv: list[str]) -> None:
    """Parse the flags.

    Raises:
      InputError: there is any fault in them.
    """
    command_line.load_config(command_line.config_file_in(argv))
    command_line.check_overrides(argv, config.keys())
    try:
        rest = flags.FLAGS(argv)[1:]
    # ml_collections sets the keys while flags are parsed: a wrong value comes as
    # whatever that raised.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags start with --")
    if _WORKDIR.value is None and not _DRY_RUN.value:
        raise InputError(
            "give a folder for the run: --workdir runs/NAME (or --dry-run)"
        )


def connect() -> None:
    """Join the other processes of the run, if there are any."""
    arguments = (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value:
        processes.connect(*arguments)
    elif any(argument is not None for argument in arguments):
        raise InputError(
            "--coordinator, --processes and --process-id need --distributed"
        )


def run() -> int:
    """Do what the parsed flags say; return the exit code."""
    connect()
    settings = config.settings_from(_CONFIG.value.to_dict())
    # Imported when all flags and settings are known to be right: it takes seconds.
    from tsd_jax.app.run import run

    return run(settings, Path(_WORKDIR.value or "."), dry_run=_DRY_RUN.value)


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no word about torch
    logging.set_verbosity(logging.ERROR)
    if {"-h", "--help"} & set(argv):
        module = flags.FLAGS.find_module_defining_flag("workdir")
        print(__doc__, flags.FLAGS.module_help(module), sep="\n")
        return 0
    try:
        with processes.interruptible():
            parse(argv)
            return run()
    except InputError as error:
        return processes.exit_run(2, str(error))
    except KeyboardInterrupt:
        return processes.exit_run(130, _INTERRUPTED)
    except BaseException as error:
        if is_full(error):
            return processes.exit_run(2, _FULL)
        if processes.is_single_process():
            raise
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        return processes.exit_run(1, line, traceback.format_exc())


def cli() -> None:
    """Run as the command `tsd-train`."""
    sys.exit(main(sys.argv))
