"""Where a model comes from: a local folder, or the hub; and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tsd_jax.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An id of the hub is OWNER/NAME; everything else is meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve(path_or_id: str | Path) -> Path:
    """Find a model's folder, fetching it from the hub where an id is given.

    An existing folder wins. What cannot be an id, or starts in an existing folder, is
    meant as a path and is never sent to the hub.

    Raises:
      InputError: if the folder does not exist, or the hub does not give it.
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
    """Load the tokenizer that lies in a model's folder, and nothing from elsewhere.

    Raises:
      InputError: if the folder has no tokenizer, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise InputError(
            f"{folder} has no tokenizer: put one of {', '.join(_TOKENIZERS)} there"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(
            f"cannot read the tokenizer in {folder} ({_first_line(error)}): fetch it "
            "again"
        ) from error


def _fetch(name: str) -> Path:
    """Bring the hub's folder `name` into huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(_FILES), ignore_patterns=["original/*"]
            )
        )
    # OfflineModeIsEnabled, LocalEntryNotFoundError and lost connections are OSErrors.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"model {name!r} is no local folder, and the hub did not give it "
            f"({_first_line(error)}): check the name, log in with `hf auth login`, or "
            "give a local folder"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
