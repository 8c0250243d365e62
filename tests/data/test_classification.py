from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer

from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import (
    Labels,
    encode_labelled,
    find_labels,
    read_labelled,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
NAMES = Labels("classification", 2, ("bad", "good"))


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})


@pytest.fixture
def write(tmp_path):
    def write(*rows, lines=False) -> Path:
        file = tmp_path / "data.json"
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        file.write_text(text)
        return file

    return write


def item(label, text="a"):
    return {"sentence": text, "label": label}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"sentence": "a"}, ("a",)),
        ({"text": "a"}, ("a",)),
        ({"sentence1": "a", "sentence2": "b"}, ("a", "b")),
        ({"premise": "a", "hypothesis": "b"}, ("a", "b")),
        ({"question": "a", "sentence": "b"}, ("a", "b")),  # QNLI
        ({"question1": "a", "question2": "b"}, ("a", "b")),  # QQP
        ({"question": "a", "passage": "b"}, ("a", "b")),  # BoolQ
    ],
)
def test_fields_of_glue_are_known(write, row, texts, lines):
    file = write({**row, "label": 1, "idx": 7}, {**row, "label": 0}, lines=lines)
    found = read_labelled(file)
    assert [each.texts for each in found] == [texts, texts]
    assert [each.label for each in found] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"label": 1}], "row 1 has no known text fields.*it has: label"),
        ([item(1), {"sentence": "a"}], 'row 2 has no field "label"'),
        ([item(1), "a"], "row 2 is a str"),
        ([item(True)], "row 1: label True is neither a word"),
        ([item(None)], "row 1: label None is neither a word"),
        ([item("")], 'row 1: field "label" is empty'),
        ([item(-1)], "row 1: label -1 means no label"),
        ([item(float("nan"))], "row 1: label nan is not a number"),
        ([item("\ud83d")], 'row 1: field "label" has half of a surrogate'),
        ([item(0, text="a \udead")], "has half of a surrogate pair"),
        ([item(1, " ")], 'row 1: field "sentence" is not a text'),
        ([item(1), {"text1": "a", "text2": "b", "label": 1}], "row 2 has 2 texts"),
        ([], "has no rows"),
    ],
)
def test_malformed_rows_are_refused_by_number(write, rows, message):
    file = write(*rows)
    with pytest.raises(InputError, match=message) as caught:
        read_labelled(file)
    assert str(file) in str(caught.value)


def labels_of(write, labels, *arguments):
    return find_labels(read_labelled(write(*map(item, labels))), *arguments)


@pytest.mark.parametrize(
    ("labels", "arguments", "expected"),
    [
        (["good", "bad", "good"], (), NAMES),
        (
            ["b", "a"],
            ("", ("b", "a", "c")),
            Labels("classification", 3, ("b", "a", "c")),
        ),
        (["b", "a"], ("", ("b", "x")), Labels("classification", 2, ("a", "b"))),
        ([0, 2, 1], (), Labels("classification", 3)),
        ([0.5, 3, 1.0], (), Labels("regression", 1)),
        ([0, 5, 1], ("regression",), Labels("regression", 1)),
        ([0.0, 1.0], (), Labels("classification", 2)),  # as pandas writes them
        ([1, 2, 2], (), Labels("classification", 2, ("1", "2"))),
        ([7.0, 2.0, 5.0], (), Labels("classification", 3, ("2", "5", "7"))),
        (
            ["ok", "fraud"],
            ("", (), "fraud"),
            Labels("classification", 2, ("fraud", "ok"), 0),
        ),
        ([0, 1], ("", (), "0"), Labels("classification", 2, (), 0)),
    ],
)
def test_labels_tell_the_problem(write, labels, arguments, expected):
    assert labels_of(write, labels, *arguments) == expected


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["good", 1], (), r"words \('good'\) and numbers \(1\)"),
        (["good", "bad"], ("regression",), "'bad' is not a number"),
        ([0, 1], ("ranking",), "unknown data.problem 'ranking'"),
        (["good", "good"], (), "two or more"),
        ([0, 0], (), "two or more"),
        ([0.5, 1.0], ("classification",), "label 0.5 is no class: classes are whole"),
        ([-1.0, 1.0], (), "label -1.0 is no class"),
        ([0, 1], ("", (), "fraud"), "data.positive 'fraud' is not one of 0, 1"),
        ([0, 1, 2], ("", (), "1"), "data.positive '1': F1 is the mean over 3 classes"),
        ([0.5, 1.0], ("", (), "1"), "data.positive '1': a regression has no classes"),
    ],
)
def test_labels_of_no_problem_are_refused(write, labels, arguments, message):
    with pytest.raises(InputError, match=message):
        labels_of(write, labels, *arguments)


def test_texts_are_encoded_with_the_tokenizers_special_tokens(write, tokenizer):
    file = write(item("good", "a b"), item("bad", "c"))
    batch, cut = encode_labelled(read_labelled(file), tokenizer, NAMES, 6)
    assert cut == 0
    np.testing.assert_array_equal(
        batch["tokens"], [[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0]]
    )
    np.testing.assert_array_equal(batch["mask"], batch["tokens"] != 0)
    np.testing.assert_array_equal(batch["token_types"], 0)
    np.testing.assert_array_equal(batch["targets"], [[1], [0]])
    np.testing.assert_array_equal(batch["weights"], [[1], [1]])
    kinds = {name: str(array.dtype) for name, array in batch.items()}
    assert kinds == {
        **dict.fromkeys(("tokens", "mask", "token_types", "targets"), "int32"),
        "weights": "float32",
    }


def test_pairs_have_types_and_the_longer_text_is_cut(write, tokenizer):
    rows = [{"premise": "a b c d", "hypothesis": "e", "label": 0.5}]
    labels = Labels("regression", 1)
    batch, cut = encode_labelled(read_labelled(write(*rows)), tokenizer, labels, 6)
    assert cut == 1
    np.testing.assert_array_equal(batch["tokens"], [[2, 5, 6, 3, 9, 3]])
    np.testing.assert_array_equal(batch["token_types"], [[0, 0, 0, 0, 1, 1]])
    assert batch["targets"].dtype == np.float32
    np.testing.assert_array_equal(batch["targets"], [[0.5]])


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (NAMES, "fine", "row 2: label 'fine' is not one of bad, good"),
        (Labels("classification", 2), 2, "row 2: label 2 is not a class from 0 to 1"),
        (Labels("classification", 2), "2", "row 2: label '2' is not a number"),
        (
            Labels("regression", 1),
            float("nan"),
            "row 2: label nan is not a number",
        ),
    ],
)
def test_a_label_unknown_in_training_is_refused(
    write, tokenizer, labels, label, message
):
    first = "bad" if labels.names else 0
    file = write(item(first), item(label))
    with pytest.raises(InputError, match=message) as caught:
        encode_labelled(read_labelled(file), tokenizer, labels, 6)
    assert str(file) in str(caught.value)


def test_a_length_without_room_is_refused(write, tokenizer):
    with pytest.raises(InputError, match=r"data\.length 2 has no room"):
        encode_labelled(read_labelled(write(item("bad"))), tokenizer, NAMES, 2)


def test_classes_are_those_there_are(write):
    labels = find_labels(read_labelled(write(item(1), item(3))))
    other = read_labelled(write(item(3.0), item(1), item(2)))
    assert [labels.target(each) for each in other[:2]] == [1, 0]
    with pytest.raises(InputError, match=r"row 3: label 2 is not one of 1, 3"):
        labels.target(other[2])
