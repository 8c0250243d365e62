"""What a PEFT adapter trains in full: `modules_to_save`, `trainable_token_indices`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE
from tsd_jax.huggingface.names import EMBEDDING, HEAD
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.names import PREFIX, TRAINED_ROWS

_EMBEDDING = EMBEDDING.removesuffix(".weight")


def full_of(files: AdapterFiles) -> dict[str, FullTensor]:
    """Return {torch tensor: its trained values or rows}; most adapters have none.

    Args:
      files: of the adapter.

    Raises:
      InputError: config and tensors disagree.
    """
    found = {}
    for name, value in files.tensors.items():
        each = _full_tensor(files, name.removeprefix(PREFIX), value)
        if each is not None and each.rows is not None and _is_copy(files, each):
            continue
        if each is not None:
            found[each.name] = each._replace(value=np.asarray(value, np.float32))
    # PEFT lists every name that a head may have: one of them must be there.
    modules = any(each.rows is None for each in found.values())
    rows = any(each.rows is not None for each in found.values())
    for key, present in (
        ("modules_to_save", modules),
        ("trainable_token_indices", rows),
    ):
        if files.config.get(key) and not present:
            raise InputError(
                f"{files.weights} holds none of what {key} of {ADAPTER_CONFIG_FILE} "
                f"names, {files.config[key]}: fetch both again"
            )
    tied = files.config.get("ensure_weight_tying") and {EMBEDDING, HEAD} <= found.keys()
    if tied and np.array_equal(found[EMBEDDING].value, found[HEAD].value):
        del found[HEAD]  # PEFT's copy of the same values
    return found


def _is_copy(files: AdapterFiles, each: FullTensor) -> bool:
    """Return whether the rows of a head are the copy of its embedding's."""
    listed = files.config["trainable_token_indices"]
    if each.name != HEAD or not isinstance(listed, Mapping) or "lm_head" in listed:
        return False
    rows = f"{PREFIX}{EMBEDDING.removesuffix('.weight')}.{TRAINED_ROWS}"
    return np.array_equal(each.value, files.tensors.get(rows, ()))


def head_follows(files: AdapterFiles) -> bool:
    """Return whether PEFT gives a tied head what is trained of the embedding alone.

    It does so with rows of the embedding, and otherwise only where it is asked to.

    Args:
      files: of the adapter.
    """
    embedding = full_of(files).get(EMBEDDING)
    of_rows = embedding is not None and embedding.rows is not None
    return of_rows or bool(files.config.get("ensure_weight_tying"))


def is_full(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor of the file holds trained values, not a factor of LoRA.

    Args:
      name: as in the file.
      config: content of adapter_config.json.
    """
    return _module(name.removeprefix(PREFIX), config) is not None


def _module(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the module of a tensor that is trained in full; None for any other."""
    module, _, ending = name.partition(f".{TRAINED_ROWS}")
    if module != name and not ending and config.get("trainable_token_indices"):
        return module
    owned = re.fullmatch(r"(.+)\.(weight|bias)", name)
    if re.search(r"\.(base_layer|original_module)\.", name):
        return None  # a copy of the base's
    saved = tuple(config.get("modules_to_save") or ())
    # A head that follows its embedding; where that does not train, it is a copy.
    follows = config.get("ensure_weight_tying") and _is_inside(_EMBEDDING, saved)
    tied = (HEAD,) if follows else ()
    if owned is None or ".lora_" in name:
        return None
    return owned[1] if _is_inside(owned[1], saved) or name in tied else None


def _is_inside(module: str, saved: tuple[str, ...]) -> bool:
    """Return whether the name of a module, or of one that holds it, ends in `saved`."""
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(saved) for n in range(len(parts)))


def _full_tensor(
    files: AdapterFiles, name: str, value: np.ndarray
) -> FullTensor | None:
    module = _module(name, files.config)
    if module is None:
        return None
    if not name.endswith(f".{TRAINED_ROWS}"):
        return FullTensor(module, name.rpartition(".")[2], value)
    listed = files.config["trainable_token_indices"]
    if isinstance(listed, Mapping):
        owner = module
        if f"{module}.weight" == HEAD and "lm_head" not in listed:
            owner = EMBEDDING.removesuffix(".weight")  # whose rows a tied head has
        fitting = [rows for key, rows in listed.items() if owner.endswith(key)]
        listed = fitting[0] if fitting else ()
    if len(listed) != len(value) or value.ndim != 2:
        raise InputError(
            f"{files.weights}: {module} has trained rows of shape {value.shape}, but "
            f"{ADAPTER_CONFIG_FILE} names {len(listed)} of them: fetch both again"
        )
    return FullTensor(module, "weight", value, tuple(int(row) for row in listed))
