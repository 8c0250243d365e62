from __future__ import annotations

from pathlib import Path

from tests.helpers.demo_runs import small_settings
from tsd_jax.app.caches import cache_folder, spectra_folder


def test_the_folder_is_the_one_named_or_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("off") is None
    assert cache_folder("here") == Path("here")
    assert cache_folder("") == tmp_path / "tsd_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("") == Path.home() / ".cache" / "tsd_jax"


def test_spectra_are_kept_only_where_asked_for(tmp_path):
    assert spectra_folder(small_settings(cache_dir=str(tmp_path))) is None
    kept = small_settings(cache_dir=str(tmp_path), cache_spectra=True)
    assert spectra_folder(kept) is not None
