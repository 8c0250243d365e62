"""Return a trained adapter to other tools.

    python -m tsd_jax.app.export RUN --to peft --out DIR [--max-rank 16]
    python -m tsd_jax.app.export RUN --to merged --out DIR [--dtype float32]

RUN is the workdir of a finished run, its adapter.safetensors, or the folder of a LoRA
adapter in PEFT's format. Exit code 2 means bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsd_jax import huggingface
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface.factors import module_factors
from tsd_jax.huggingface.full_tensors import FullTensor, full_tensors, neighbours
from tsd_jax.huggingface.merge import merge_factors, to_merged
from tsd_jax.huggingface.merge_encoder import Trained, recorded_labels, write_merged
from tsd_jax.huggingface.model_folder import (
    ADAPTER_CONFIG_FILE,
    copy_tokenizer,
    has_tokenizer,
)
from tsd_jax.huggingface.names import ModuleName
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.full_params import full_of
from tsd_jax.huggingface.peft.modules import modules_of
from tsd_jax.huggingface.peft.write import PeftExport, to_peft, write_adapter
from tsd_jax.models.encoder_config import EncoderConfig
from tsd_jax.storage.adapter_file import SavedAdapter, load_adapter

ADAPTER = "adapter.safetensors"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Hold a PEFT adapter.

    Attributes:
      factors: {torch module: factors}. base_model: name of its base, or None.
      whole: {tensor: what it trains whole}. tied: whether head and embedding are one.
      task_type: of PEFT.
    """

    factors: Mapping[str, Any]
    base_model: str | None
    whole: Mapping[str, FullTensor]
    tied: bool
    task_type: str = "CAUSAL_LM"


def read(source: Path) -> SavedAdapter | Foreign:
    """Read a run's adapter, an adapter file, or a folder of PEFT's.

    Raises:
      InputError: it is none of them, or damaged.
    """
    if (source / ADAPTER).is_file():
        return load_adapter(source / ADAPTER)
    if (source / ADAPTER_CONFIG_FILE).is_file():
        files = read_files(source)
        config = files.config
        factors = {name: module.factors for name, module in modules_of(files).items()}
        return Foreign(
            factors,
            config.get("base_model_name_or_path"),
            full_of(files),
            bool(config.get("ensure_weight_tying")),
            config.get("task_type") or "CAUSAL_LM",
        )
    if source.is_dir():
        raise InputError(
            f"{source} holds neither {ADAPTER} of a finished run nor "
            f"{ADAPTER_CONFIG_FILE} of PEFT"
        )
    return load_adapter(source)


def export_peft(
    found: SavedAdapter | Foreign, out: Path, base: str, max_rank: int | None
) -> PeftExport:
    """Write a PEFT adapter."""
    if isinstance(found, Foreign):
        return write_adapter(
            out,
            found.factors,
            {*found.factors},
            base_model=base,
            max_rank=max_rank,
            tensors=found.whole,
            tied=found.tied,
            task_type=found.task_type,
        )
    return to_peft(
        out,
        found.trainable,
        found.directions,
        _module_name(base),
        base_model=base,
        params=_shapes(base, found),
        max_rank=max_rank,
        task_type=_task_type(base),
    )


def _module_name(base: str) -> ModuleName:
    """Name modules as the base's family does, where the base lies here."""
    if not (Path(base) / "config.json").is_file():
        return huggingface.module_name
    family = huggingface.read_config(base).model_type
    return functools.partial(huggingface.module_name, model_type=family)


def _task_type(base: str) -> str:
    """Name what the base's family does, where the base lies here."""
    if not (Path(base) / "config.json").is_file():
        return "CAUSAL_LM"
    family = huggingface.family_of(huggingface.read_config(base))
    return family.kind.peft_task


def _shapes(base: str, found: SavedAdapter) -> Any:
    """Return the base's parameter shapes where it lies here: modules get short names.

    The arrays, where a part is not all of its module.
    """
    if not (Path(base) / "config.json").is_file():
        return None
    stacked = any(path.startswith("layers/") for path in found.trainable.paths)
    config = huggingface.read_config(base)
    shapes = huggingface.abstract_params(config, scan_layers=stacked)
    if not neighbours(found.spec.full, paths.flatten(shapes)):
        return shapes
    return huggingface.load_params(base, config, scan_layers=stacked)


def export_merged(
    found: SavedAdapter | Foreign,
    out: Path,
    base: str,
    dtype: str | None,
    tokenizer: Path | None = None,
    labels: Labels | None = None,
) -> str:
    """Write a merged checkpoint, and tell what rounding did."""
    folder = huggingface.resolve(base)
    if isinstance(config := huggingface.read_config(folder), EncoderConfig):
        trained = _trained(found, _module_name(str(folder)))
        stored = write_merged(out, folder, config, trained, labels=labels, dtype=dtype)
        return f"merged {len(trained.factors)} modules, {stored}, in {out}"
    if isinstance(found, Foreign):
        done = merge_factors(
            out,
            found.factors,
            base_folder=folder,
            dtype=dtype,
            full=found.whole,
            tokenizer_folder=tokenizer,
        )
    else:
        done = to_merged(
            out,
            found.trainable,
            found.directions,
            _module_name(str(folder)),
            base_folder=folder,
            dtype=dtype,
            tokenizer_folder=tokenizer,
        )
    told = f"merged {len(done.errors)} modules, {', '.join(done.dtypes)}, in {out}"
    if done.error:
        told += (
            f"\nrounding changed what was merged by {done.error:.2%} of its norm; "
            "--dtype float32 keeps it"
        )
    return told


def _trained(found: SavedAdapter | Foreign, module_name: ModuleName) -> Trained:
    """Gather what is merged into an encoder."""
    if isinstance(found, Foreign):
        return Trained(found.factors, found.whole)
    return Trained(
        module_factors(found.trainable.adapters, found.directions, module_name),
        full_tensors(found.trainable.full, module_name),
    )


def _peft_told(done: PeftExport, out: Path) -> str:
    told = f"adapter of rank {done.rank} in {out}"
    if done.errors:
        worst = max(done.errors, key=lambda name: done.errors[name])
        told += (
            f"\ncut {len(done.errors)} modules; relative error {done.error:.3g} "
            f"in all, {done.errors[worst]:.3g} at most ({worst})"
        )
    if done.dora:
        told += "\nDoRA: where that is not served, as in vLLM, export --to merged"
    elif done.rank > 16:
        told += f"\nvLLM serves it with --max-lora-rank of {done.rank} or more"
    return told


def export(options: argparse.Namespace) -> str:
    """Do what the options say, and tell about it.

    Raises:
      InputError: the options, the adapter or the base do not serve.
    """
    if options.to == "peft" and options.dtype:
        raise InputError("--dtype is of merged weights; a PEFT adapter is float32")
    if options.to == "merged" and options.max_rank is not None:
        raise InputError("--max-rank is of PEFT adapters; merged weights have no rank")
    found = read(options.source)
    base = options.base or found.base_model
    if not base:
        raise InputError(f"{options.source} does not name its base: give --base")
    if options.to == "merged":
        tokenizer = _tokenizer_folder(options.source)
        labels = recorded_labels(options.source)
        return export_merged(found, options.out, base, options.dtype, tokenizer, labels)
    if options.out.resolve() == options.source.resolve():
        raise InputError(f"{options.out} is what is read: give another --out")
    done = export_peft(found, options.out, base, options.max_rank)
    tokenizer = _tokenizer_folder(options.source)
    if tokenizer is not None and tokenizer.resolve() != options.out.resolve():
        copy_tokenizer(tokenizer, options.out)
    return _peft_told(done, options.out)


def _tokenizer_folder(source: Path) -> Path | None:
    """Find the tokenizer that lies beside an adapter with added tokens."""
    beside = source if (source / ADAPTER_CONFIG_FILE).is_file() else source / "adapter"
    folder = source.parent / "adapter" if source.is_file() else beside
    return folder if has_tokenizer(folder) else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = _Parser(
        prog="python -m tsd_jax.app.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("source", metavar="RUN", type=Path)
    made.add_argument("--to", choices=("peft", "merged"), required=True)
    made.add_argument("--out", type=Path, required=True, metavar="DIR")
    made.add_argument("--base", help="the base model, where it is another than noted")
    made.add_argument("--dtype", choices=_DTYPES, help="merged: of the weights")
    made.add_argument(
        "--max-rank", type=int, metavar="N", help="peft: cut to this rank"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Run the command line; give the exit code."""
    try:
        print(export(parser().parse_args(argv)))
    except InputError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # What the library would log is printed here anyway.
    logging.getLogger("tsd_jax.interchange").setLevel(logging.ERROR)
    sys.exit(main(sys.argv[1:]))
