"""What a PEFT adapter trains whole: `modules_to_save`, `trainable_token_indices`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.peft.write import CONFIG, PREFIX, ROWS, WEIGHTS
from tsd_jax.huggingface.vocabulary import EMBEDDING, HEAD
from tsd_jax.storage.files import read_json, read_tensors


def read_full(folder: str | Path) -> dict[str, FullTensor]:
    """Read what an adapter trains whole: {tensor: values or rows}; mostly nothing.

    Raises:
      InputError: a file is missing or damaged, or config and tensors disagree.
    """
    folder = Path(folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    return whole_of(folder / WEIGHTS, read_json(folder / CONFIG), tensors)


def whole_of(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, FullTensor]:
    """Sort out of an adapter's tensors what is trained whole; see `read_full`."""
    found = {}
    for name, value in tensors.items():
        each = _whole(file, name.removeprefix(PREFIX), value, config)
        if each is not None:
            found[each.name] = each._replace(value=np.asarray(value, np.float32))
    kinds = {each.rows is None for each in found.values()}
    # PEFT names heads by every name they may have: one of them must be there.
    for key, kind in (("modules_to_save", True), ("trainable_token_indices", False)):
        if config.get(key) and kind not in kinds:
            raise InputError(
                f"{file} holds nothing of what {key} of {CONFIG} names, {config[key]}: "
                "fetch both again"
            )
    both = {EMBEDDING, HEAD} <= found.keys() and config.get("ensure_weight_tying")
    if both and np.array_equal(found[EMBEDDING].value, found[HEAD].value):
        del found[HEAD]  # PEFT's copy of the same
    return found


def is_full(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a tensor of the file is trained whole, and no factor of a LoRA."""
    return _module(name.removeprefix(PREFIX), config) is not None


def _module(name: str, config: Mapping[str, Any]) -> str | None:
    """Return the module of a tensor that is trained whole."""
    module, _, ending = name.partition(f".{ROWS}")
    if module != name and not ending and config.get("trainable_token_indices"):
        return module
    owned = re.fullmatch(r"(.+)\.(weight|bias)", name)
    saved = tuple(config.get("modules_to_save") or ())
    tied = (HEAD,) if config.get("ensure_weight_tying") else ()
    if owned is None or ".lora_" in name:
        return None
    return owned[1] if _is_inside(owned[1], saved) or name in tied else None


def _is_inside(module: str, saved: tuple[str, ...]) -> bool:
    """Return whether a module, or one that holds it, ends as one of `saved`."""
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(saved) for n in range(len(parts)))


def _whole(
    file: Path, name: str, value: np.ndarray, config: Mapping[str, Any]
) -> FullTensor | None:
    module = _module(name, config)
    if module is None:
        return None
    if not name.endswith(f".{ROWS}"):
        return FullTensor(module, name.rpartition(".")[2], value)
    listed = config["trainable_token_indices"]
    if isinstance(listed, Mapping):
        fitting = [rows for key, rows in listed.items() if module.endswith(key)]
        listed = fitting[0] if fitting else ()
    if len(listed) != len(value) or value.ndim != 2:
        raise InputError(
            f"{file}: {module} has trained rows of shape {value.shape}, and {CONFIG} "
            f"names {len(listed)} of them: fetch both again"
        )
    return FullTensor(module, "weight", value, tuple(int(row) for row in listed))
