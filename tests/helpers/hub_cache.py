"""Models and adapters as they lie in huggingface_hub's cache, without a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import constants

COMMIT = "a" * 40


def cached(
    monkeypatch,
    cache: Path,
    name: str,
    files: Mapping[str, str | bytes],
    commit: str = COMMIT,
    ref: str = "main",
) -> Path:
    """Put files into a cache as a snapshot of `name`, and return its folder.

    The cache is made the client's, which stays offline as in all tests.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repo = cache / f"models--{name.replace('/', '--')}"
    folder = repo / "snapshots" / commit
    for part in ("refs", "blobs"):
        (repo / part).mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True)
    (repo / "refs" / ref).write_text(commit)
    for file, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        blob = repo / "blobs" / hashlib.sha256(commit.encode() + data).hexdigest()
        blob = blob.with_name(blob.name + file)  # one each: tests remove single blobs
        blob.write_bytes(data)
        (folder / file).symlink_to(blob)
    return folder
