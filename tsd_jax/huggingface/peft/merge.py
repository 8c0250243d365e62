"""Merge an adapter in PEFT's format into its base."""

from __future__ import annotations

from pathlib import Path

from jax.typing import DTypeLike

from tsd_jax.huggingface.merge import MergedExport, merge_factors
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.full_params import full_of, head_follows
from tsd_jax.huggingface.peft.modules import modules_of


def merge_peft(
    folder: str | Path,
    adapter: str | Path,
    *,
    base_folder: str | Path,
    dtype: DTypeLike | None = None,
    tokenizer_folder: str | Path | None = None,
) -> MergedExport:
    """Write the base's checkpoint with a PEFT adapter merged into its weights.

    Args:
      folder: new or empty.
      adapter: folder of the adapter.
      base_folder: as in `to_merged`.
      dtype: as in `to_merged`.
      tokenizer_folder: as in `to_merged`.

    Raises:
      InputError: as `to_merged`, or the adapter is not a plain LoRA.
    """
    files = read_files(adapter)
    return merge_factors(
        folder,
        {name: module.factors for name, module in modules_of(files).items()},
        base_folder=base_folder,
        dtype=dtype,
        full=full_of(files),
        tokenizer_folder=tokenizer_folder,
        head_follows=head_follows(files),
    )
