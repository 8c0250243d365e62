"""The two files of an adapter that Hugging Face PEFT saved, read and checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from tsd_jax.storage.atomic import read_json
from tsd_jax.storage.tensors import read_tensors

# Config fields that make an adapter something other than a plain LoRA: what it is then.
_UNSUPPORTED = {
    "lora_bias": "biases of its own",
    "layer_replication": "a base with repeated layers",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "use_qalora": "a QALoRA adapter",
    "use_bdlora": "a block-diagonal adapter",
    "arrow_config": "a router over adapters",
    "kasa_config": "a KaSA adapter, which changes its base",
    "monteclora_config": "a MonteCLoRA adapter",
}
# The adapter's name, which the state dict of a wrapped model has inside its keys.
_ADAPTER_NAME = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|"
    r"modules_to_save|trainable_tokens_delta)\.default(?=\.|$)"
)
_MAGNITUDE = "lora_magnitude_vector.weight"
# Initializations that subtract from the base's weights what the adapter adds back.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """A plain LoRA adapter as it is stored.

    Attributes:
      folder: that holds it.
      config: content of adapter_config.json.
      tensors: {name: values} of adapter_model.safetensors.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.folder / ADAPTER_WEIGHTS_FILE

    @property
    def parameters(self) -> Collection[str]:
        """The names under which PEFT adapts parameters instead of modules."""
        return self.config.get("target_parameters") or ()


def read_files(folder: str | Path) -> AdapterFiles:
    """Read an adapter's files, refusing what is not a plain LoRA on its own base.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
      InputError: a file is missing or damaged, or the adapter is of another kind; one
        line says which.
    """
    folder = Path(folder)
    config = read_json(folder / ADAPTER_CONFIG_FILE)
    _check_plain(folder / ADAPTER_CONFIG_FILE, config)
    weights = folder / ADAPTER_WEIGHTS_FILE
    if not weights.is_file() and weights.with_suffix(".bin").is_file():
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle, which is not opened here: "
            "load it with PEFT and save it again with safe_serialization=True"
        )
    stored, _ = read_tensors(weights)
    return AdapterFiles(folder, config, _canonical(weights, stored))


def _canonical(file: Path, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors under the names that save_pretrained gives them."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in stored.items():
        if not value.size:
            raise InputError(
                f"{file} holds {name!r} without values: it was saved under ZeRO-3 or "
                "FSDP before its shards were gathered; gather them and save it again"
            )
        new = _ADAPTER_NAME.sub(r".\1", name).replace(".modules_to_save.", ".")
        new = new.removesuffix(".weight") if new.endswith(_MAGNITUDE) else new
        if not np.array_equal(tensors.setdefault(new, value), value):
            raise InputError(
                f"{file} holds {new!r} twice, with different values: save it again"
            )
    return tensors


def _check_plain(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse by name every adapter that is not a plain LoRA on an unchanged base."""
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type is {config.get('peft_type')!r}, and only 'LORA' is read"
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{file}: bias is {config['bias']!r}, and trained biases are not "
            "supported; only 'none' is read"
        )
    for name, what in _UNSUPPORTED.items():
        if config.get(name):
            raise InputError(f"{file}: {name} is {config[name]!r}: it is {what}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {start!r}: the adapter belongs to a base "
            "whose weights that initialization has changed; let PEFT convert it to a "
            "plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
