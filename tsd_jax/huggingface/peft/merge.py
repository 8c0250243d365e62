"""Merge an adapter in PEFT's format into its base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.merge import MergedExport, merge_factors
from tsd_jax.huggingface.merge_tied import is_tied
from tsd_jax.huggingface.model_folder import CONFIG_FILE
from tsd_jax.huggingface.names import EMBEDDING, canonical_names, name_in_files
from tsd_jax.huggingface.peft.base_copies import base_copies, full_on_base
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.full_params import full_of, head_follows
from tsd_jax.huggingface.peft.modules import modules_of
from tsd_jax.huggingface.tensors import open_checkpoint
from tsd_jax.storage.atomic import read_json


def merge_peft(
    folder: str | Path,
    adapter: AdapterFiles,
    *,
    base_folder: str | Path,
    dtype: DTypeLike | None = None,
    tokenizer_folder: str | Path | None = None,
) -> MergedExport:
    """Write the base's checkpoint with a PEFT adapter merged into its weights.

    Args:
      folder: new or empty.
      adapter: of `read_files`.
      base_folder: as in `to_merged`.
      dtype: as in `to_merged`.
      tokenizer_folder: as in `to_merged`.

    Raises:
      InputError: as `to_merged`, or config and tensors of the adapter disagree.
    """
    base = Path(base_folder)
    family = str(read_json(base / CONFIG_FILE).get("model_type"))
    return merge_factors(
        folder,
        {
            name_in_files(name, family): module.factors
            for name, module in modules_of(adapter).items()
        },
        base_folder=base,
        dtype=dtype,
        full=full_in_folder(adapter, base),
        tokenizer_folder=tokenizer_folder,
        head_follows=head_follows(adapter),
    )


def full_in_folder(files: AdapterFiles, base: Path) -> dict[str, FullTensor]:
    """Return {torch tensor: what the adapter has in place of the base's values}.

    Args:
      files: of the adapter.
      base: folder of the base, whose weights are read where the adapter has copies.

    Raises:
      InputError: as `full_on_base`, or the base is damaged.
    """
    if not base_copies(files):
        return full_of(files)
    config, found = read_json(base / CONFIG_FILE), open_checkpoint(base)
    tied, family = is_tied(config), str(config.get("model_type"))
    stored = {new: found[old] for new, old in canonical_names(found, family).items()}

    def read(name: str) -> np.ndarray | None:
        tensor = stored.get(EMBEDDING if tied and name not in stored else name)
        return None if tensor is None else tensor.read((slice(None),))

    return full_on_base(files, read, tied=tied)
