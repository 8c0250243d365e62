"""Where models and adapters come from: local folders, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.model_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    INDEX_FILE,
)
from tsd_jax.huggingface.tensors import weight_files

# A hub id is OWNER/NAME; anything else is meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_PATTERNS = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model")
_MODEL_FILES = ("*.safetensors", *_TOKENIZER_PATTERNS)
_ADAPTER_FILES = (ADAPTER_WEIGHTS_FILE, *_TOKENIZER_PATTERNS)


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Return a model's local folder, downloading it from the hub if an id is given.

    An existing folder wins. What cannot be an id, or begins with an existing folder,
    is taken as a path and never sent to the hub.

    Args:
      path_or_id: the folder, or OWNER/NAME.
      revision: branch, tag or commit of the hub's model; None for its main branch.

    Raises:
      InputError: the folder does not exist or is given a revision, or the hub does not
        provide the model, or its copy in the cache lacks files.
    """
    if not str(path_or_id):
        raise InputError("no model is named: give a folder, or a hub id OWNER/NAME")
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        if revision:
            raise InputError(
                f"revision {revision!r} is for a hub id, but {folder} is a local "
                "folder: leave the revision out"
            )
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file: give the folder that holds the model")
    name = str(path_or_id)
    if not is_hub_id(name):
        raise InputError(
            f"model folder {folder} does not exist: give an existing folder in "
            "Hugging Face format, or a hub id OWNER/NAME"
        )
    found = _fetch(name, revision)
    _check_complete(name, found, _first_missing(found))
    return found


def resolve_adapter(path_or_id: str | Path) -> Path:
    """Return where an adapter lies, downloading one in PEFT's format from the hub.

    What exists wins, and what cannot be an id is taken as a path, as in `resolve`.

    Args:
      path_or_id: a file or folder, which may not exist, or OWNER/NAME.

    Raises:
      InputError: the hub does not provide the adapter, or its copy in the cache lacks
        files.
    """
    path, name = Path(path_or_id).expanduser(), str(path_or_id)
    if path.exists() or not is_hub_id(name):
        return path
    found = _fetch(name, None, _ADAPTER_FILES, ignored="*/*", kind="adapter")
    needed = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
    lacking = [file for file in needed if not (found / file).is_file()]
    _check_complete(name, found, lacking[0] if lacking else None, kind="adapter")
    return found


def is_hub_id(name: str) -> bool:
    """Return whether a name that is no existing path is a hub id."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).parent.is_dir()


def _fetch(
    name: str,
    revision: str | None,
    files: tuple[str, ...] = _MODEL_FILES,
    ignored: str = "original/*",
    kind: str = "model",
) -> Path:
    """Download `name` from the hub into huggingface_hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=[ignored],
            )
        )
    # OfflineModeIsEnabled, LocalEntryNotFoundError and lost connections are OSErrors.
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{kind} {name!r} is not a local folder, and downloading it from the hub"
            f"{at} failed ({_first_line(error)}): check the name, log in with `hf auth "
            "login`, or give a local folder"
        ) from error


def _first_missing(folder: Path) -> str | None:
    """Return the first file that a model needs and a snapshot lacks, or None.

    Where no index says which files the weights are in, nothing is known to be missing.
    """
    needed = [folder / CONFIG_FILE]
    if (folder / CONFIG_FILE).is_file() and (folder / INDEX_FILE).is_file():
        needed += weight_files(folder)
    missing = [file for file in needed if not file.is_file()]
    return str(missing[0].relative_to(folder)) if missing else None


def _check_complete(
    name: str, folder: Path, missing: str | None, kind: str = "model"
) -> None:
    """Raise InputError where a snapshot lacks a file.

    The hub's client returns what is in its cache when it cannot reach the hub.
    """
    if missing is not None:
        raise InputError(
            f"{kind} {name!r} lacks {missing} in {folder}: if the hub has it, complete "
            f"the download while online (`hf download {name}`, without HF_HUB_OFFLINE)"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
