from __future__ import annotations

import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tsd_jax.storage.spectra_folder import SpectraFolder

VALUES = np.linspace(2, 1, 4)
VECTORS = np.eye(4, dtype=np.float32)[::-1]


@pytest.fixture
def folder(tmp_path):
    SpectraFolder(tmp_path / "spectra").save("key", VALUES, VECTORS)
    return tmp_path / "spectra"


def test_what_is_saved_is_found_again(folder):
    found = SpectraFolder(folder).load("key", 4)
    assert found is not None
    values, vectors = found
    np.testing.assert_array_equal(values, VALUES)
    np.testing.assert_array_equal(vectors, VECTORS)
    assert (values.dtype, vectors.dtype) == (np.float64, np.float32)
    assert [file.name for file in folder.iterdir()] == ["key.safetensors"]


def test_absent_or_of_another_size(folder):
    assert SpectraFolder(folder).load("other", 4) is None
    assert SpectraFolder(folder).load("key", 5) is None
    assert SpectraFolder(folder / "nowhere").load("key", 4) is None


def truncate(file):
    file.write_bytes(file.read_bytes()[:-5])


def alter(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def foreign(file):
    save_file(load_file(file), file, {"format": "another"})


def stale(file):
    os.replace(file, file.with_name("stale.safetensors"))
    SpectraFolder(file.parent).save("other", VALUES, VECTORS)
    os.replace(file.with_name("other.safetensors"), file)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [truncate, alter, foreign, stale, empty])
def test_a_harmed_file_reads_as_absent_and_is_written_anew(folder, harm):
    harm(folder / "key.safetensors")
    store = SpectraFolder(folder)
    assert store.load("key", 4) is None
    store.save("key", VALUES, VECTORS)
    assert store.load("key", 4) is not None


def test_the_longest_unused_make_room(tmp_path):
    size = VALUES.nbytes + VECTORS.nbytes
    store = SpectraFolder(tmp_path, max_bytes=4 * size + 2000)
    for n, name in enumerate("abc"):
        store.save(name, VALUES, VECTORS)
        os.utime(tmp_path / f"{name}.safetensors", (n, n))
    one = (tmp_path / "a.safetensors").stat().st_size
    small = SpectraFolder(tmp_path, max_bytes=3 * one)
    assert small.load("a", 4) is not None  # used just now
    small.save("d", VALUES, VECTORS)
    names = sorted(file.stem for file in tmp_path.iterdir())
    assert names == ["a", "c", "d"]
    tiny = SpectraFolder(tmp_path, max_bytes=10)
    tiny.save("e", VALUES, VECTORS)
    assert tiny.load("e", 4) is None


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    store = SpectraFolder(blocked / "spectra")
    store.save("key", VALUES, VECTORS)
    assert store.load("key", 4) is None
