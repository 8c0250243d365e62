"""A model's folder in Hugging Face format: the names of its files, and new folders."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from tsd_jax.core.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
)
"""A tokenizer can be loaded where one of these is."""

_TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)
_TEMPLATES = "additional_chat_templates/*.jinja"
# What belongs to a model beside its weights: settings, tokenizer, licence.
_COMPANIONS = (
    "*.json",
    "*.jinja",
    _TEMPLATES,
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def check_new_folder(folder: Path, base: Path) -> None:
    """Refuse an output folder in which something would be overwritten.

    Args:
      folder: to be written.
      base: folder of the base model.

    Raises:
      InputError: there is no base, or `folder` is the base's, is not empty, is a file
        or lies below one.
    """
    if not base.is_dir():
        raise InputError(f"base folder {base} does not exist: give the base model's")
    if folder.resolve() == base.resolve():
        raise InputError(f"{folder} is the base's own folder: give a new one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: give a new or empty folder")
    for parent in folder.parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{folder}: {parent} is a file; give a folder")


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `folder` when the block succeeds.

    Raises:
      InputError: the folder cannot be written.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder} ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_companions(base: Path, target: Path) -> None:
    """Copy config.json, generation settings, tokenizer and licence of a model."""
    for file in sorted({file for each in _COMPANIONS for file in base.glob(each)}):
        weights = "safetensors" in file.name
        if file.is_file() and not weights and file.name != ADAPTER_CONFIG_FILE:
            _copy(file, base, target)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Replace the tokenizer files in `target` by those in `source`."""
    for file in tokenizer_files(target):
        file.unlink()
    for file in tokenizer_files(source):
        _copy(file, source, target)


def _copy(file: Path, source: Path, target: Path) -> None:
    """Copy a file to the same place in another folder."""
    new = target / file.relative_to(source)
    new.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, new)


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder holds files of a tokenizer."""
    return bool(tokenizer_files(folder))


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Return the files of a tokenizer that a folder holds."""
    folder = Path(folder)
    files = [folder / name for name in _TOKENIZER_FILES]
    return [file for file in files if file.is_file()] + sorted(folder.glob(_TEMPLATES))
