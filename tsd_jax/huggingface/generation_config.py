"""The tokens that end a text, as a checkpoint lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.model_folder import CONFIG_FILE
from tsd_jax.storage.atomic import read_json

GENERATION_FILE = "generation_config.json"


def read_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the ids of generation_config.json, or of config.json where there is none.

    Chat models list several. A folder that names none, or null, has none.

    Args:
      folder: of the model.

    Raises:
      InputError: a file is damaged, or lists what are no ids.
    """
    file = Path(folder) / GENERATION_FILE
    if not file.is_file():
        file = Path(folder) / CONFIG_FILE
    found: Any = read_json(file).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise InputError(
            f"{file}: eos_token_id is {found!r}, and must be an id or a list of them: "
            "fetch the file again"
        )
    return tuple(sorted(set(ids)))
