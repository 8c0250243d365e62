"""Trained adapters as they lie on disk: a run's own, or one in PEFT's format."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsd_jax import huggingface
from tsd_jax.app.model import facts_of
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullSpec
from tsd_jax.huggingface.factors import Factors, module_factors
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.full_tensors import full_tensors, neighbours
from tsd_jax.huggingface.merge import MergedExport, to_merged
from tsd_jax.huggingface.merge_encoder import Trained
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE
from tsd_jax.huggingface.names import TOKEN_AXES, ModuleName
from tsd_jax.huggingface.peft.base_copies import base_copies
from tsd_jax.huggingface.peft.files import AdapterFiles, read_files
from tsd_jax.huggingface.peft.full_params import full_of
from tsd_jax.huggingface.peft.merge import full_in_folder, merge_peft
from tsd_jax.huggingface.peft.modules import modules_of
from tsd_jax.huggingface.peft.write import PeftExport, to_peft, write_adapter
from tsd_jax.storage.adapter_file import BaseFacts, SavedAdapter, load_adapter
from tsd_jax.storage.run_files import ADAPTER


class TrainedAdapter(Protocol):
    """What an export needs of an adapter, wherever it was trained."""

    @property
    def base_model(self) -> str | None:
        """Name or path of its base model, if it is known."""
        ...

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of that model on the hub, if one is recorded."""
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

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of that model on the hub, if one is recorded."""
        return self.saved.base_revision

    def write_peft(self, out: Path, base: str, max_rank: int | None) -> PeftExport:
        """Write it in PEFT's format."""
        facts, params = self._base(base)
        return to_peft(
            out,
            self.saved.trainable,
            self.saved.directions,
            _module_name(facts),
            base_model=base,
            params=params,
            max_rank=max_rank,
            task_type=facts.peft_task,
            tied=facts.tied,
            revision=revision_of(self, base),
        )

    def merge(
        self, out: Path, base: Path, dtype: str | None, tokenizer: Path | None
    ) -> MergedExport:
        """Write a decoder's checkpoint with the adapter merged into it."""
        return to_merged(
            out,
            self.saved.trainable,
            self.saved.directions,
            _module_name(self._facts(huggingface.read_config(base), str(base))),
            base_folder=base,
            dtype=dtype,
            tokenizer_folder=tokenizer,
        )

    def trained(self, base: Path) -> Trained:
        """Return what is merged into an encoder."""
        saved = self.saved
        name = _module_name(self._facts(huggingface.read_config(base), str(base)))
        return Trained(
            module_factors(saved.trainable.adapters, saved.directions, name),
            full_tensors(saved.trainable.full, name),
        )

    def _base(self, base: str) -> tuple[BaseFacts, Any]:
        """Return what is known of the base, and its parameters if they are here.

        Modules get short names by them. Shapes suffice, unless PEFT saves some that did
        not train along with one that did.
        """
        saved = self.saved
        folder = Path(base).expanduser()
        if not (folder / CONFIG_FILE).is_file():
            recorded = saved.base if base == saved.base_model else None
            if recorded is not None and not _may_have_neighbours(saved.spec.full):
                return recorded, None
            folder = resolve_base(self, base)
        config = huggingface.read_config(folder)
        facts = self._facts(config, base)
        stacked = any(path.startswith("layers/") for path in saved.trainable.paths)
        shapes = huggingface.abstract_params(config, scan_layers=stacked)
        if not neighbours(saved.spec.full, paths.flatten(shapes)):
            return facts, shapes
        return facts, huggingface.load_params(folder, config, scan_layers=stacked)

    def _facts(self, config: ModelConfig, base: str) -> BaseFacts:
        """Return what a base's config says, which must be of the recorded family."""
        facts, recorded = facts_of(config), self.saved.base
        if recorded is not None and recorded.model_type != facts.model_type:
            raise InputError(
                f"{base} is a {facts.model_type}, but the adapter was trained on a "
                f"{recorded.model_type}: give --base, the base that was trained on"
            )
        return facts


@dataclass(frozen=True)
class PeftFolder:
    """An adapter in PEFT's format."""

    files: AdapterFiles

    @property
    def base_model(self) -> str | None:
        """Name or path of its base model, if it is known."""
        return self.files.config.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """Branch, tag or commit of that model on the hub, if one is recorded."""
        return self.files.config.get("revision")

    @property
    def factors(self) -> dict[str, Factors]:
        """{torch module: its low-rank factors}."""
        return {name: each.factors for name, each in modules_of(self.files).items()}

    def write_peft(self, out: Path, base: str, max_rank: int | None) -> PeftExport:
        """Write it in PEFT's format."""
        full = full_of(self.files)
        if base_copies(self.files):
            full = full_in_folder(self.files, resolve_base(self, base))
        factors, config = self.factors, self.files.config
        return write_adapter(
            out,
            factors,
            {*factors},
            base_model=base,
            max_rank=max_rank,
            tensors=full,
            tied=bool(config.get("ensure_weight_tying")),
            task_type=config.get("task_type"),
            revision=revision_of(self, base),
        )

    def merge(
        self, out: Path, base: Path, dtype: str | None, tokenizer: Path | None
    ) -> MergedExport:
        """Write a decoder's checkpoint with the adapter merged into it."""
        return merge_peft(
            out,
            self.files,
            base_folder=base,
            dtype=dtype,
            tokenizer_folder=tokenizer,
        )

    def trained(self, base: Path) -> Trained:
        """Return what is merged into an encoder."""
        return Trained(self.factors, full_in_folder(self.files, base))


def read_adapter(source: str | Path) -> TrainedAdapter:
    """Read a run's adapter, an adapter file, or a PEFT adapter's folder or hub id.

    Raises:
      InputError: it is none of them, or damaged.
    """
    found = huggingface.resolve_adapter(source)
    if (found / ADAPTER).is_file():
        return RunAdapter(load_adapter(found / ADAPTER))
    if (found / ADAPTER_CONFIG_FILE).is_file():
        return PeftFolder(read_files(found))
    if found.is_dir():
        raise InputError(
            f"{found} holds neither {ADAPTER} of a finished run nor "
            f"{ADAPTER_CONFIG_FILE} of PEFT"
        )
    return RunAdapter(load_adapter(found))


def revision_of(adapter: TrainedAdapter, base: str) -> str | None:
    """Return the revision of a base on the hub; only the recorded base has one."""
    here = Path(base).expanduser().is_dir()
    return adapter.base_revision if base == adapter.base_model and not here else None


def resolve_base(adapter: TrainedAdapter, base: str) -> Path:
    """Return the folder of a base that has to be read.

    Args:
      adapter: whose base it is.
      base: a folder, or a hub id.

    Raises:
      InputError: as `huggingface.resolve`.
    """
    try:
        return huggingface.resolve(base, revision_of(adapter, base))
    except InputError as error:
        raise InputError(f"{error}; --base names the folder of the base") from error


def _may_have_neighbours(full: Collection[FullSpec]) -> bool:
    """Return whether PEFT may save more than what trains, by the modules' names."""
    return any(each.rows is None and each.path not in TOKEN_AXES for each in full)


def _module_name(facts: BaseFacts) -> ModuleName:
    """Return how the base's family names modules."""
    return functools.partial(huggingface.module_name, model_type=facts.model_type)
