"""Folders that keep work from run to run: compiled programs, and spectra of bases."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from tsd_jax.app.settings import Settings
from tsd_jax.storage.spectra_folder import SpectraFolder

_PROGRAM_BYTES = 2 * 1024**3


def cache_folder(cache_dir: str) -> Path | None:
    """Return the folder of all caches; None for "off"."""
    if cache_dir == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_dir or Path(home) / "tsd_jax")


def use_program_cache(cache_dir: str) -> None:
    """Let JAX keep compiled programs from run to run, at most 2 GB of them."""
    folder = cache_folder(cache_dir)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
        jax.config.update("jax_compilation_cache_max_size", _PROGRAM_BYTES)


def spectra_folder(settings: Settings) -> SpectraFolder | None:
    """Return the folder of the base's spectra; None where none are kept."""
    folder = cache_folder(settings.cache_dir)
    if folder is None or not settings.cache_spectra:
        return None
    return SpectraFolder(folder / "spectra", int(settings.cache_spectra_gb * 2**30))
