from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tsd_jax.core.errors import InputError
from tsd_jax.storage import tensors

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5).astype(ml_dtypes.bfloat16)


@pytest.fixture
def file(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_what_safetensors_wrote_is_read(file):
    found, metadata = tensors.read_tensors(file)
    assert metadata == {"format": "pt"}
    np.testing.assert_array_equal(found["a"], A)
    np.testing.assert_array_equal(found["b"], B)
    assert found["b"].dtype == B.dtype


def test_what_is_written_safetensors_reads(tmp_path):
    file = tmp_path / "y.safetensors"
    tensors.write_tensors(file, {"a": A}, {"format": "pt"})
    np.testing.assert_array_equal(load_file(file)["a"], A)
    assert list(tmp_path.iterdir()) == [file]


def test_the_header_says_where_the_bytes_are(file):
    header = tensors.read_header(file)
    content = file.read_bytes()
    assert {name: (each.dtype, each.shape) for name, each in header.items()} == {
        "a": ("F32", (3, 4)),
        "b": ("BF16", (5,)),
    }
    for name, array in {"a": A, "b": B}.items():
        assert content[header[name].start : header[name].stop] == array.tobytes()


@pytest.mark.parametrize("read", [tensors.read_header, tensors.read_tensors])
@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_damaged_and_missing_files_are_refused(file, read, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="corrupt or truncated") as caught:
        read(file)
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(InputError, match="does not exist"):
        read(file)
