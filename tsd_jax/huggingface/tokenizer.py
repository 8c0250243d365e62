"""Tokenizers of transformers: read from a model's folder, and saved with new tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsd_jax.core.errors import InputError
from tsd_jax.data.framing import frame_of
from tsd_jax.huggingface.model_folder import VOCABULARY_FILES
from tsd_jax.storage.atomic import read_json_or_empty, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
# The class that every version of transformers knows for a tokenizer.json alone.
_GENERIC = "PreTrainedTokenizerFast"
# Classes that only version 5 knows, and fields that say where it found the files.
_ONLY_NEW = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
_OF_LOADING = ("backend", "is_local", "local_files_only", "name_or_path")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a model's folder; nothing is downloaded, no code is run.

    Args:
      folder: of the model. One of `VOCABULARY_FILES` is enough: a tokenizer.json, a
        sentencepiece model, a vocab.txt, or a vocab.json with its merges.txt.

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
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "auto_map" in read_json_or_empty(folder / TOKENIZER_CONFIG):
            raise InputError(
                f"the tokenizer in {folder} asks for code of its own (auto_map in "
                f"{TOKENIZER_CONFIG}), which is not run: give one that transformers "
                "knows"
            ) from error
        raise InputError(
            f"cannot read the tokenizer in {folder} ({reason}): fetch it again"
        ) from error


def save_tokenizer(tokenizer: Any, base: str | Path, folder: str | Path) -> None:
    """Write a tokenizer that has learned new tokens, as its base's was written.

    Its class and fields (such as `add_bos_token`) stay those of the base: transformers
    5 saves its own class names, which version 4 does not know.

    Args:
      tokenizer: of transformers.
      base: folder of the model it comes from.
      folder: to write to.
    """
    tokenizer.save_pretrained(str(folder))
    file = Path(folder) / TOKENIZER_CONFIG
    old = read_json_or_empty(Path(base) / TOKENIZER_CONFIG)
    new = {**read_json_or_empty(file), **old}
    if new.get("tokenizer_class", _ONLY_NEW[0]) in _ONLY_NEW:
        new["tokenizer_class"] = _GENERIC
    if tokenizer.bos_token_id is not None and "add_bos_token" not in new:
        # Version 4 adds it by default for some classes.
        new["add_bos_token"] = tokenizer.bos_token_id in frame_of(tokenizer).front
    for name in _OF_LOADING:
        new.pop(name, None)
    if "chat_template" in old and (Path(folder) / "chat_template.jinja").is_file():
        del new["chat_template"]
    if "added_tokens_decoder" in old:
        known = tokenizer.added_tokens_decoder.items()
        new["added_tokens_decoder"] = {str(n): t.__getstate__() for n, t in known}
    write_json(file, new, sort_keys=True)
