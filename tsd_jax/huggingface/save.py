"""A parameter tree written as a checkpoint that stock transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike
from safetensors.numpy import save_file

from tsd_jax.huggingface.casts import cast
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.model_folder import CONFIG_FILE, WEIGHTS_FILE
from tsd_jax.huggingface.names import to_huggingface


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors of a model.

    Args:
      folder: created if it does not exist; the two files are replaced atomically.
      config: of the model.
      params: the tree of parameters, scanned or not, without adapters.
      dtype: to round the weights to; by default the parameters' own.
      extra: more entries of config.json, such as `eos_token_id`.

    Raises:
      InputError: if `params` is not the tree of a model with this config, or `dtype`
        cannot hold a value.
    """
    tensors = to_huggingface(params, config)
    if dtype is not None:
        tensors = {name: cast(each, dtype, name) for name, each in tensors.items()}
    stored = str(next(iter(tensors.values())).dtype)
    text = json.dumps({**config_json(config, stored), **(extra or {})}, indent=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    # Both are complete before either is replaced: an interrupted write harms neither.
    new_weights, new_settings = (Path(f"{file}.new") for file in (weights, settings))
    new_settings.write_text(text + "\n", encoding="utf-8")
    save_file(tensors, new_weights, metadata={"format": "pt"})
    shutil.copymode(new_settings, new_weights)  # safetensors lets only the owner read
    os.replace(new_weights, weights)
    os.replace(new_settings, settings)
