from __future__ import annotations

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.storage import atomic


def test_atomic_writes_leave_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_json(path, {"a": 1})

    def fail(part):
        part.write_text("half a f")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic.write_atomically(path, fail)
    assert atomic.read_json(path) == {"a": 1}
    atomic.write_json(path, {"a": 2})
    assert atomic.read_json(path) == {"a": 2}


def test_a_file_is_only_seen_whole(tmp_path):
    path = tmp_path / "x"

    def write(part):
        part.write_text("whole")
        assert not path.exists()
        assert part.parent == tmp_path  # on the same disk, or it would be copied

    atomic.write_atomically(path, write)
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    atomic.write_json(tmp_path / "x", {"b": [1, 2], "a": "é"})
    assert (tmp_path / "x").read_bytes() == (
        b'{\n  "b": [\n    1,\n    2\n  ],\n  "a": "\\u00e9"\n}\n'
    )
    assert atomic.read_json(tmp_path / "x") == {"b": [1, 2], "a": "é"}


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"3", b"\xff"])
def test_what_is_not_a_json_object_reads_as_an_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    assert atomic.read_json_or_empty(tmp_path / "x") == {}


def test_keys_are_sorted_on_request(tmp_path):
    atomic.write_json(tmp_path / "x", {"b": 1, "a": {"d": 2, "c": 3}}, sort_keys=True)
    text = (tmp_path / "x").read_text()
    assert [text.index(f'"{name}"') for name in "acdb"] == sorted(
        text.index(f'"{name}"') for name in "acdb"
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"cannot read .*x\.json \(No such file"),
        (b"{", r"x\.json is not JSON"),
        (b"\xff", r"x\.json is not JSON"),
        (b"[]", r"x\.json is not a JSON object"),
    ],
)
def test_the_strict_reader_says_what_is_wrong(tmp_path, content, told):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        atomic.read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
