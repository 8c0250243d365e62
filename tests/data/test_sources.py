from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.data.sources import Record, read_file, read_instructions, read_text

ROW = {"instruction": "Name a colour.", "output": "it is red", "answer": "red"}


def write(folder: Path, text: str, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_list_and_lines_give_the_same_records(tmp_path):
    rows = [ROW, {**ROW, "input": "é\u2028", "options": ["red", "blue"]}]
    listed = write(tmp_path, json.dumps(rows, indent=2))
    # U+2028 unescaped is valid inside a JSON string and must not split the line.
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines = write(tmp_path, text + "\n\n", "data.jsonl")
    expected = [
        Record("Name a colour.", "", "it is red", "red", ()),
        Record("Name a colour.", "é\u2028", "it is red", "red", ("red", "blue")),
    ]
    assert read_instructions(listed) == expected
    assert read_instructions(lines) == expected


def test_a_byte_order_mark_is_no_text(tmp_path):
    content = "\N{BYTE ORDER MARK}" + json.dumps([ROW])
    assert read_instructions(write(tmp_path, content)) == [
        Record("Name a colour.", "", "it is red", "red", ())
    ]
    assert read_text(write(tmp_path, "\N{BYTE ORDER MARK}abc", "a.txt")) == "abc"


def test_options_come_from_the_announced_format(tmp_path):
    text = "Is it?\n\nAnswer format: true/false"
    path = write(tmp_path, json.dumps([{"instruction": text, "output": "true"}]))
    assert read_instructions(path)[0].options == ("true", "false")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.json is empty"),
        (" \n ", "data.json is empty"),
        ("[]", "data.json has no rows"),
        ("[{]", r"data.json is not JSON \(line 1: "),
        ('{"instruction": "a", "output": "b"}\nx', r"data.json is not JSON \(line 2: "),
        ("[1]", "data.json, row 1 is a int; each row must be an object"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]',
            r'data.json, row 2 has no field "output" \(it has: instruction\)',
        ),
        (
            r'[{"instruction": "cut \ud83d", "output": "b"}]',
            r"row 1: field \"instruction\" has half of a surrogate pair \('\\ud83d'\) "
            "at character 4; mend or",
        ),
        (
            r'[{"instruction": "a", "output": "b", "options": ["\udead", "c"]}]',
            'row 1: field "options" has half of a surrogate',
        ),
        ('[{"instruction": 3, "output": "b"}]', 'row 1: field "instruction" is a int'),
        ('[{"instruction": "a", "output": ""}]', 'row 1: field "output" is empty'),
        (
            '[{"instruction": "a", "output": "b", "options": "a/b"}]',
            'row 1: field "options" is not a list of strings',
        ),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        read_instructions(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_instructions, read_text])
def test_unreadable_files(tmp_path, read):
    with pytest.raises(InputError, match=r"none\.txt does not exist"):
        read(tmp_path / "none.txt")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"ab\xe9")
    with pytest.raises(InputError, match=r"latin is not UTF-8 text \(byte 2\)"):
        read(tmp_path / "latin")


def test_text_is_read_as_it_is(tmp_path):
    assert read_text(write(tmp_path, " a\nb ")) == " a\nb "


def test_a_file_is_read_once_with_the_digest_of_its_bytes(tmp_path):
    """A pipe can be read only once: what was read is used from then on."""
    content = json.dumps([ROW]).encode() + b"\r\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    file = read_file(pipe)
    writer.join()
    assert file.digest == hashlib.sha256(content).hexdigest()
    assert read_text(file) == content.decode().replace("\r\n", "\n")
    assert [record.answer for record in read_instructions(file)] == ["red"]
    bad = dataclasses.replace(file, text="[1]")
    with pytest.raises(InputError, match=r"^/.*pipe, row 1 is a int"):
        read_instructions(bad)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("boolq/train", 9427, 2),
        ("boolq/test", 3270, 2),
        ("piqa/test", 1838, 2),
        ("winogrande/test", 1267, 2),
        ("social_i_qa/test", 1954, 3),
        ("openbookqa/test", 500, 4),
    ],
)
def test_commonsense_files(shared, name, rows, options):
    records = read_instructions(shared / "data" / "commonsense" / f"{name}.json")
    assert len(records) == rows
    assert {len(record.options) for record in records} == {options}
    assert all(record.answer in record.options for record in records)
    assert all(r.output == f"the correct answer is {r.answer}" for r in records)


@pytest.mark.shared
def test_another_format_names_the_missing_field(shared):
    path = shared / "data" / "math" / "gsm8k" / "test.jsonl"
    with pytest.raises(
        InputError, match=r'row 1 has no field "instruction" .*question'
    ):
        read_instructions(path)
