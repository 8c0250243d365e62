"""The file config.json: read into a model's config, and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families.family import Family, ModelConfig
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.huggingface.families.registry import FAMILIES, family_of
from tsd_jax.huggingface.model_folder import CONFIG_FILE
from tsd_jax.huggingface.tensors import holds_floats
from tsd_jax.storage.atomic import read_json


def read_config(folder: str | Path) -> Any:
    """Read a model's config.json, refusing what the networks here do not compute.

    Args:
      folder: of the model.

    Returns:
      A DecoderConfig or an EncoderConfig, depending on model_type.

    Raises:
      InputError: if the file is missing or damaged, lacks a field, has one of the
        wrong type, or asks for an unsupported architecture, activation, rotary
        embedding or kind of layer, or for quantized weights.
    """
    file = Path(folder) / CONFIG_FILE
    found = read_json(file)
    family = _find_family(file, found)
    fields = Fields(file, found, family.defaults)
    values = family.kind.read(fields)
    try:
        values |= family.read(fields)
        return family.kind.config(**{"model_type": found["model_type"], **values})
    except InputError as error:
        if str(error).startswith(str(file)):
            raise
        raise InputError(f"{file}: {error}") from error


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of the config.json that transformers reads as this model.

    Args:
      config: of the model.
      dtype: of the stored weights, by name.
    """
    family = family_of(config)
    return {
        "architectures": [family.architecture_of(config)],
        "model_type": config.model_type,
        **family.kind.write(config),
        **family.write(config),
        "torch_dtype": dtype,
    }


def _find_family(file: Path, found: Mapping[str, Any]) -> Family:
    """Return the family a config.json names, refusing others and quantized weights."""
    name = found.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(
            f"{file}: model_type is {name!r}, and only {', '.join(FAMILIES)} are "
            f"supported: {_way_out(found)}"
        )
    family = FAMILIES[name]
    # Of a class without a head, only a tied model is complete; its weights are checked.
    headless = family.architecture.replace("ForCausalLM", "Model")
    only = [[each] for each in dict.fromkeys([*family.accepted, headless])]
    given = found.get("architectures") or only[0]
    if given not in only:
        raise InputError(
            f"{file}: architectures of a {name} is {given!r}, and only "
            f"{' or '.join(map(repr, only))} is supported: choose another checkpoint"
        )
    settings = found.get("quantization_config")
    if settings and not holds_floats(file.parent):
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise InputError(
            f"{file}: quantization_config: weights quantized by {method or settings!r} "
            "are not supported: choose the unquantized original"
        )
    return family


def _way_out(found: Mapping[str, Any]) -> str:
    """Return what to do instead of loading an unsupported family."""
    text = found.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if inner in FAMILIES:
        return f"save its text model, a {inner}, as a checkpoint of its own"
    return "choose another checkpoint"
