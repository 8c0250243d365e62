"""Trained adapters as they lie on disk: a run's own, or one in PEFT's format."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsd_jax import huggingface
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.factors import Factors, module_factors
from tsd_jax.huggingface.full_tensors import FullTensor, full_tensors, neighbours
from tsd_jax.huggingface.merge import MergedExport, merge_factors, to_merged
from tsd_jax.huggingface.merge_encoder import Trained
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE
from tsd_jax.huggingface.names import ModuleName
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.full_params import full_of
from tsd_jax.huggingface.peft.modules import modules_of
from tsd_jax.huggingface.peft.write import PeftExport, to_peft, write_adapter
from tsd_jax.storage.adapter_file import SavedAdapter, load_adapter

ADAPTER = "adapter.safetensors"
"""The library's own adapter file, in a run's workdir."""


class TrainedAdapter(Protocol):
    """What an export needs of an adapter, wherever it was trained."""

    @property
    def base_model(self) -> str | None:
        """Name or path of its base model, if it is known."""
        ...

    def write_peft(self, out: Path, base: str, max_rank: int | None) -> PeftExport:
        """Write it in PEFT's format.

        Args:
          out: folder to write to.
          base: name or path of the base model.
          max_rank: to cut modules of a higher rank to, or None.
        """
        ...

    def merge(
        self, out: Path, base: Path, dtype: str | None, tokenizer: Path | None
    ) -> MergedExport:
        """Write a decoder's checkpoint with the adapter merged into it.

        Args:
          out: folder to write to.
          base: folder of the base model.
          dtype: of all weights; None for the base's own.
          tokenizer: folder of the tokenizer of a vocabulary that has grown, or None.
        """
        ...

    def trained(self, base: Path) -> Trained:
        """Return what is merged into an encoder.

        Args:
          base: folder of the base model.
        """
        ...


@dataclass(frozen=True)
class RunAdapter:
    """The adapter that a run of tsd_jax has trained."""

    saved: SavedAdapter

    @property
    def base_model(self) -> str | None:
        """Name or path of its base model, if it is known."""
        return self.saved.base_model

    def write_peft(self, out: Path, base: str, max_rank: int | None) -> PeftExport:
        """Write it in PEFT's format."""
        return to_peft(
            out,
            self.saved.trainable,
            self.saved.directions,
            _module_name(base),
            base_model=base,
            params=self._params(base),
            max_rank=max_rank,
            task_type=_task_type(base),
        )

    def merge(
        self, out: Path, base: Path, dtype: str | None, tokenizer: Path | None
    ) -> MergedExport:
        """Write a decoder's checkpoint with the adapter merged into it."""
        return to_merged(
            out,
            self.saved.trainable,
            self.saved.directions,
            _module_name(str(base)),
            base_folder=base,
            dtype=dtype,
            tokenizer_folder=tokenizer,
        )

    def trained(self, base: Path) -> Trained:
        """Return what is merged into an encoder."""
        saved, name = self.saved, _module_name(str(base))
        return Trained(
            module_factors(saved.trainable.adapters, saved.directions, name),
            full_tensors(saved.trainable.full, name),
        )

    def _params(self, base: str) -> Any:
        """Return the base's parameters, by which modules get short names, or None.

        Shapes suffice, unless PEFT saves some that did not train along with one that
        did; None where the base is not here.
        """
        if not _is_here(base):
            return None
        paths_here = self.saved.trainable.paths
        stacked = any(path.startswith("layers/") for path in paths_here)
        config = huggingface.read_config(base)
        shapes = huggingface.abstract_params(config, scan_layers=stacked)
        if not neighbours(self.saved.spec.full, paths.flatten(shapes)):
            return shapes
        return huggingface.load_params(base, config, scan_layers=stacked)


@dataclass(frozen=True)
class PeftFolder:
    """An adapter in PEFT's format.

    Attributes:
      factors: {torch module: its low-rank factors}.
      full: {tensor: what trained in full}.
      base_model: name or path of its base model, if it is known.
      tied: whether the base's head and embedding are one.
      task_type: of PEFT.
    """

    factors: Mapping[str, Factors]
    full: Mapping[str, FullTensor]
    base_model: str | None
    tied: bool
    task_type: str

    def write_peft(self, out: Path, base: str, max_rank: int | None) -> PeftExport:
        """Write it in PEFT's format."""
        return write_adapter(
            out,
            self.factors,
            {*self.factors},
            base_model=base,
            max_rank=max_rank,
            tensors=self.full,
            tied=self.tied,
            task_type=self.task_type,
        )

    def merge(
        self, out: Path, base: Path, dtype: str | None, tokenizer: Path | None
    ) -> MergedExport:
        """Write a decoder's checkpoint with the adapter merged into it."""
        return merge_factors(
            out,
            self.factors,
            base_folder=base,
            dtype=dtype,
            full=self.full,
            tokenizer_folder=tokenizer,
        )

    def trained(self, base: Path) -> Trained:
        """Return what is merged into an encoder."""
        del base
        return Trained(self.factors, self.full)


def read_adapter(source: Path) -> TrainedAdapter:
    """Read a run's adapter, an adapter file, or a folder in PEFT's format.

    Raises:
      InputError: it is none of them, or damaged.
    """
    if (source / ADAPTER).is_file():
        return RunAdapter(load_adapter(source / ADAPTER))
    if (source / ADAPTER_CONFIG_FILE).is_file():
        return _read_peft(source)
    if source.is_dir():
        raise InputError(
            f"{source} holds neither {ADAPTER} of a finished run nor "
            f"{ADAPTER_CONFIG_FILE} of PEFT"
        )
    return RunAdapter(load_adapter(source))


def _read_peft(folder: Path) -> PeftFolder:
    files = read_files(folder)
    config, modules = files.config, modules_of(files)
    return PeftFolder(
        factors={name: module.factors for name, module in modules.items()},
        full=full_of(files),
        base_model=config.get("base_model_name_or_path"),
        tied=bool(config.get("ensure_weight_tying")),
        task_type=config.get("task_type") or "CAUSAL_LM",
    )


def _is_here(base: str) -> bool:
    """Return whether a base model is a folder here."""
    return (Path(base) / "config.json").is_file()


def _module_name(base: str) -> ModuleName:
    """Return how the base's family names modules, if the base is here."""
    if not _is_here(base):
        return huggingface.module_name
    family = huggingface.read_config(base).model_type
    return functools.partial(huggingface.module_name, model_type=family)


def _task_type(base: str) -> str:
    """Return PEFT's name of what the base's family does, if the base is here."""
    if not _is_here(base):
        return "CAUSAL_LM"
    family = huggingface.family_of(huggingface.read_config(base))
    return family.kind.peft_task
