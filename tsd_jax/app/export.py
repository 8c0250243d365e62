"""Export a trained adapter for other tools.

    tsd-export RUN --to peft --out DIR [--max-rank 16]
    tsd-export RUN --to merged --out DIR [--dtype float32]

RUN is the workdir of a finished run, its adapter.safetensors, or a LoRA adapter in
PEFT's format: its folder, or its hub id OWNER/NAME. `python -m tsd_jax.app.export`
is the same command. Exit code 2 means bad input.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tsd_jax import huggingface
from tsd_jax.app.adapters import TrainedAdapter, read_adapter, resolve_base
from tsd_jax.app.command_line import Parser
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface.merge import MergedExport
from tsd_jax.huggingface.merge_encoder import write_merged
from tsd_jax.huggingface.model_folder import (
    ADAPTER_CONFIG_FILE,
    copy_tokenizer,
    has_tokenizer,
)
from tsd_jax.huggingface.peft.write import PeftExport
from tsd_jax.models.encoder_config import EncoderConfig
from tsd_jax.storage.atomic import read_json_or_empty
from tsd_jax.storage.run_files import CONFIG

_DTYPES = ("float32", "bfloat16", "float16")


def export(options: argparse.Namespace) -> str:
    """Do what the options say; return what was done, in words.

    Raises:
      InputError: an option has no meaning here, or the adapter or the base cannot be
        read or does not fit.
    """
    if options.to == "peft" and options.dtype:
        raise InputError("--dtype is for merged weights; a PEFT adapter is float32")
    if options.to == "merged" and options.max_rank is not None:
        raise InputError("--max-rank is for PEFT adapters; merged weights have no rank")
    source = huggingface.resolve_adapter(options.source)
    adapter = read_adapter(source)
    base = options.base or adapter.base_model
    if not base:
        raise InputError(f"{options.source} does not name its base: give --base")
    if options.to == "merged":
        return export_merged(adapter, source, options.out, base, options.dtype)
    return export_peft(adapter, source, options.out, base, options.max_rank)


def export_peft(
    adapter: TrainedAdapter, source: Path, out: Path, base: str, max_rank: int | None
) -> str:
    """Write a PEFT adapter, with its tokenizer where that has grown."""
    if out.resolve() == source.resolve():
        raise InputError(f"{out} is the folder that is read: give another --out")
    done = adapter.write_peft(out, base, max_rank)
    tokenizer = tokenizer_folder(source)
    if tokenizer is not None and tokenizer.resolve() != out.resolve():
        copy_tokenizer(tokenizer, out)
    return _peft_told(done, out)


def export_merged(
    adapter: TrainedAdapter, source: Path, out: Path, base: str, dtype: str | None
) -> str:
    """Write the base's checkpoint with the adapter merged into its weights."""
    folder = resolve_base(adapter, base)
    config = huggingface.read_config(folder)
    if isinstance(config, EncoderConfig):
        trained, labels = adapter.trained(folder), recorded_labels(source)
        stored = write_merged(out, folder, config, trained, labels=labels, dtype=dtype)
        return f"merged {len(trained.factors)} modules, {stored}, in {out}"
    done = adapter.merge(out, folder, dtype, tokenizer_folder(source))
    return _merged_told(done, out)


def recorded_labels(source: Path) -> Labels | None:
    """Return what a run has recorded of its labels in its config.json, or None."""
    found = read_json_or_empty(source / CONFIG).get("labels")
    return Labels(**{**found, "names": tuple(found["names"])}) if found else None


def tokenizer_folder(source: Path) -> Path | None:
    """Return the folder of the tokenizer that came with added tokens, or None."""
    beside = source if (source / ADAPTER_CONFIG_FILE).is_file() else source / "adapter"
    folder = source.parent / "adapter" if source.is_file() else beside
    return folder if has_tokenizer(folder) else None


def _peft_told(done: PeftExport, out: Path) -> str:
    told = f"adapter of rank {done.rank} in {out}"
    if done.errors:
        worst = max(done.errors, key=lambda name: done.errors[name])
        told += (
            f"\ncut {len(done.errors)} modules; relative error {done.error:.3g} "
            f"overall, {done.errors[worst]:.3g} at most ({worst})"
        )
    if done.dora:
        told += "\nDoRA: where that is not served, as in vLLM, export --to merged"
    elif done.rank > 16:
        told += f"\nvLLM serves it with --max-lora-rank of {done.rank} or more"
    return told


def _merged_told(done: MergedExport, out: Path) -> str:
    told = f"merged {len(done.errors)} modules, {', '.join(done.dtypes)}, in {out}"
    if not done.error:
        return told
    return (
        f"{told}\nrounding changed what was merged by {done.error:.2%} of its norm; "
        "--dtype float32 keeps it exact"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(
        prog="tsd-export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", metavar="RUN")
    made.add_argument("--to", choices=("peft", "merged"), required=True)
    made.add_argument("--out", type=Path, required=True, metavar="DIR")
    made.add_argument("--base", help="the base model, if it is not the recorded one")
    made.add_argument("--dtype", choices=_DTYPES, help="merged: type of the weights")
    made.add_argument(
        "--max-rank", type=int, metavar="N", help="peft: cut to this rank"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code."""
    try:
        print(export(parser().parse_args(argv)))
    except InputError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    return 0


def cli() -> None:
    """Run as the command `tsd-export`."""
    # What the library would log of rounding and cutting is printed here anyway.
    logging.getLogger("tsd_jax.huggingface").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    cli()
