"""Where a model comes from: a local folder, or the hub; and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.model_folder import VOCABULARY_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A hub id is OWNER/NAME; anything else is meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FETCHED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve(path_or_id: str | Path) -> Path:
    """Return a model's local folder, downloading it from the hub if an id is given.

    An existing folder wins. What cannot be an id, or begins with an existing folder,
    is taken as a path and never sent to the hub.

    Raises:
      InputError: if the folder does not exist, or the hub does not provide the model.
    """
    if not str(path_or_id):
        raise InputError("no model is named: give a folder, or a hub id OWNER/NAME")
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file: give the folder that holds the model")
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name) or Path(name).parent.is_dir():
        raise InputError(
            f"model folder {folder} does not exist: give an existing folder in "
            "Hugging Face format, or a hub id OWNER/NAME"
        )
    return _fetch(name)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder; nothing is downloaded.

    Raises:
      InputError: if the folder has no tokenizer, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / file).is_file() for file in VOCABULARY_FILES):
        raise InputError(
            f"{folder} has no tokenizer: put one of {', '.join(VOCABULARY_FILES)} there"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"cannot read the tokenizer in {folder} ({_first_line(error)}): fetch it "
            "again"
        ) from error


def _fetch(name: str) -> Path:
    """Download the hub's model `name` into huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(_FETCHED), ignore_patterns=["original/*"]
            )
        )
    # OfflineModeIsEnabled, LocalEntryNotFoundError and lost connections are OSErrors.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"model {name!r} is not a local folder, and downloading it from the hub "
            f"failed ({_first_line(error)}): check the name, log in with `hf auth "
            "login`, or give a local folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
