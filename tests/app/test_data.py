"""Files are read once and encoded: what is trained on, and what is held out."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer

from tests.helpers.demo_runs import ASSETS, small_settings
from tsd_jax import huggingface
from tsd_jax.app.data import read_files
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels

ROWS = [
    {"sentence": f"w{n} w{n % 3}", "label": ("bad", "good")[n % 2]} for n in range(20)
]


def files_of(**changes):
    settings = small_settings(**changes)
    return read_files(settings.data, settings.seed)


@pytest.fixture(scope="module")
def tokenizer():
    return huggingface.load_tokenizer(ASSETS / "model")


@pytest.fixture
def labelled(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    return {
        "data__kind": "classification",
        "data__path": str(file),
        "data__eval_path": "",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"instruction": "a", "output": "b"}, {"output": "c"}]',
            r"row 2 .*instruction",
        ),
        ("[]", r"has no rows; give a file with at least one"),
        ("", r"is empty"),
        ("{", r"is not JSON"),
    ],
)
def test_bad_data_file_is_named_with_its_row(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        files_of(data__path=str(path))
    assert str(path) in str(caught.value)


def test_text_is_held_out_at_its_end(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three four five " * 40)
    text = {"data__kind": "text", "data__path": str(file), "data__eval_path": ""}
    data = files_of(**text, data__held_out=0.25, data__length=8).encode(tokenizer, None)
    assert (data.metrics, data.records, data.template) == (("nll",), (), None)
    assert data.held_out is not None
    count = len(data.held_out["tokens"])
    assert count > 1
    text_ids = tokenizer(
        "one two three four five " * 30, add_special_tokens=False, verbose=False
    )["input_ids"]
    assert data.notes == (
        f"{len(text_ids):,} tokens to train on, {count:,} windows held out",
    )
    assert data.rows(4).batch(0)["tokens"].shape == (4, 8)


def test_instructions_of_another_file_are_held_out(tokenizer):
    data = files_of(data__length=16).encode(tokenizer, None)
    wanted = json.loads((ASSETS / "task/test.json").read_text())
    assert [record.output for record in data.records] == [r["output"] for r in wanted]
    assert data.held_out is None
    assert data.metrics == ("nll", "choices", "generate")
    assert data.rows(4).batch(0)["tokens"].shape == (4, 16)
    assert data.notes[1] == "each is <s> prompt output </s>"


def test_what_the_length_cuts_is_told(tokenizer):
    data = files_of(data__length=12).encode(tokenizer, None)
    assert any("data.length 12 cuts the output of" in note for note in data.notes)


def test_labels_are_of_the_whole_file_and_it_is_read_once(labelled, monkeypatch):
    reads = []
    plain = Path.read_bytes, Path.read_text

    def counted(kind):
        def read(self, *args, **kwargs):
            reads.append(self.name)
            return plain[kind](self, *args, **kwargs)

        return read

    monkeypatch.setattr(Path, "read_bytes", counted(0))
    monkeypatch.setattr(Path, "read_text", counted(1))
    files = files_of(**labelled, data__length=8)
    labels = files.labels(())
    assert labels == Labels("classification", 2, ("bad", "good"))
    assert files.labels(("good", "odd", "bad")) == Labels(
        "classification", 3, ("good", "odd", "bad")
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{n}" for n in range(20)]
    bert = BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    data = files.encode(bert, labels)
    assert reads.count("rows.json") == 1
    assert data.notes == (
        "18 items to train on, 2 held out",
        "f1 is that of 'good'; data.positive names another class",
    )
    assert data.held_out is not None
    seen = np.concatenate([data.rows(18).batch(0)["targets"], data.held_out["targets"]])
    assert sorted(seen[:, 0].tolist()) == [0] * 10 + [1] * 10


@pytest.mark.parametrize("kind", ["text", "instructions", "classification"])
def test_nothing_is_held_out_where_the_share_is_0(kind, labelled, tokenizer):
    paths = {
        "text": ASSETS / "task/train.json",
        "instructions": ASSETS / "task/train.json",
        "classification": labelled["data__path"],
    }
    data = {"data__kind": kind, "data__path": str(paths[kind]), "data__eval_path": ""}
    files = files_of(**data, data__held_out=0.0, data__length=16)
    labels = files.labels(())
    encoded = files.encode(tokenizer, labels)
    assert not encoded.evaluated
    assert (encoded.held_out, [*encoded.records]) == (None, [])
    assert re.search(r"0 (windows )?held out$", encoded.notes[0])
    held = files_of(**data, data__held_out=0.2, data__length=16)
    assert held.encode(tokenizer, labels).evaluated


def test_each_file_is_opened_once_and_has_its_digest(monkeypatch):
    train, test = (ASSETS / "task" / f"{name}.json" for name in ("train", "test"))
    opened = []
    plain = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: opened.append(self) or plain(self)
    )
    both = files_of().digests
    assert opened == [train, test]
    assert both == {
        "data.path": hashlib.sha256(plain(train)).hexdigest(),
        "data.eval_path": hashlib.sha256(plain(test)).hexdigest(),
    }
    opened.clear()
    assert len({*files_of(data__path=str(test)).digests.values()}) == 1
    assert opened == [test]
    assert files_of(data__eval_path="").digests == {"data.path": both["data.path"]}


def test_other_kinds_have_no_labels(tmp_path):
    assert files_of().labels(()) is None
    assert not files_of().labelled
    file = tmp_path / "text.txt"
    file.write_text("some words " * 30)
    text = {"data__kind": "text", "data__path": str(file), "data__eval_path": ""}
    assert files_of(**text).labels(()) is None
