"""What tells a base model from another one in the same folder, without reading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tsd_jax.huggingface.model_folder import CONFIG_FILE, tokenizer_files
from tsd_jax.huggingface.tensors import weight_files

_BLOCK, _BLOCKS = 4096, 64


def fingerprint(folder: Path) -> dict[str, str]:
    """Return {name of a file: digest} of a model's config, tokenizer and weights.

    Small files are read in full. Of weights it takes the size, the header, and some
    blocks at equal distances: other training changes all of them.

    Args:
      folder: of the model.
    """
    small = [folder / CONFIG_FILE, *tokenizer_files(folder)]
    digests = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes())
        for file in small
    }
    digests |= {
        str(file.relative_to(folder)): _of_weights(file)
        for file in weight_files(folder)
    }
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _of_weights(file: Path) -> hashlib._Hash:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        length = content.read(8)
        digest.update(content.read(min(int.from_bytes(length, "little"), size)))
        for number in range(_BLOCKS + 1):
            content.seek(max(size - _BLOCK, 0) * number // _BLOCKS)
            digest.update(content.read(_BLOCK))
    return digest
