"""Labelled texts and pairs of texts, as GLUE has them: read, and encoded.

A batch is a dict of "tokens", "mask" and "token_types" (B, T) int32, of "targets"
(B, 1), int32 classes or float32 numbers, and of "weights" (B, 1) float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.data.encoding import Arrays, Tokenizer
from tsd_jax.data.sources import read_rows

# Fields that hold the texts, in the order they are looked for; GLUE's, and BoolQ's.
TEXT_FIELDS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
PROBLEMS = ("classification", "regression")

Label = str | int | float


@dataclass(frozen=True)
class Labelled:
    """One item: one text or two, and its label, a name, a class or a number.

    where: it was read, to name in errors.
    """

    texts: tuple[str, ...]
    label: Label
    where: str = ""


@dataclass(frozen=True)
class Labels:
    """Say what labels mean.

    Attributes:
      problem: of `PROBLEMS`.
      count: classes, or 1 number.
      names: of classes, in order; () where they are numbers.
    """

    problem: str
    count: int
    names: tuple[str, ...] = ()

    def target(self, item: Labelled) -> int | float:
        """Return the class or number that a label stands for.

        Raises:
          InputError: it is none of these; the line names the item.
        """
        label, where = item.label, item.where
        if self.names:
            if label in self.names:
                return self.names.index(str(label))
            known = ", ".join(self.names)
            raise InputError(f"{where}: label {label!r} is none of {known}")
        if isinstance(label, str):
            raise InputError(f"{where}: label {label!r} is no number")
        if self.problem == "regression":
            if math.isfinite(label):
                return float(label)
        elif label == int(label) and 0 <= label < self.count:
            return int(label)
        kind = "number" if self.problem == "regression" else f"class below {self.count}"
        raise InputError(f"{where}: label {label!r} is no {kind}")


def read_labelled(path: str | Path) -> list[Labelled]:
    """Read a JSON list or JSON lines of labelled texts.

    Every row needs a `label` and the fields of one of `TEXT_FIELDS`; other fields are
    ignored. All rows have the same number of texts.

    Raises:
      InputError: the file is missing, empty or not JSON, or a row has not the format.
    """
    rows = read_rows(path)
    items = [_item(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]
    counts = [len(item.texts) for item in items]
    for number, count in enumerate(counts, start=1):
        if count != counts[0]:
            raise InputError(
                f"{path}, row {number} has {count} texts, but row 1 has {counts[0]}"
            )
    return items


def find_labels(
    items: Sequence[Labelled], problem: str = "", known: tuple[str, ...] = ()
) -> Labels:
    """Say what the labels of some items mean.

    Words are classes, in the order of `known` where it has all of them, or else of the
    alphabet. Numbers that are all whole are classes from 0 on; others are a regression.

    Args:
      items: of `read_labelled`.
      problem: of `PROBLEMS`, where the labels do not tell; "" lets them.
      known: names that a checkpoint's head has.

    Raises:
      InputError: unknown problem, labels of several kinds, or fewer than two classes.
    """
    if problem not in ("", *PROBLEMS):
        raise InputError(
            f"unknown data.problem {problem!r}; choose {' or '.join(PROBLEMS)}, or '' "
            "for what the labels are"
        )
    labels = {item.label for item in items}
    words = {label for label in labels if isinstance(label, str)}
    if words and words != labels:
        some = min(labels - words, key=repr)
        raise InputError(
            f"labels are words ({min(words)!r}) and numbers ({some!r}); make them alike"
        )
    if words and problem == "regression":
        raise InputError(f"label {min(words)!r} is no number: a regression needs some")
    if words:
        names = known if words <= {*known} else tuple(sorted(words))
        return _classes(len(names), names)
    numbers = [label for label in labels if not isinstance(label, str)]
    whole = all(isinstance(label, int) for label in numbers)
    if problem == "regression" or (not problem and not whole):
        return Labels("regression", 1)
    return _classes(int(max(numbers)) + 1, ())


def encode_labelled(
    items: Sequence[Labelled],
    tokenizer: Tokenizer,
    labels: Labels,
    length: int,
) -> tuple[Arrays, int]:
    """Encode items with the tokenizer's special tokens, padded or cut to `length`.

    Of two texts the longer one is cut. Padding stands where the tokenizer puts it.

    Returns:
      The batch of all items (N, T), and how many of them were cut.

    Raises:
      InputError: a label is none of `labels`, or there is no room for any text.
    """
    kinds = {"classification": np.int32, "regression": np.float32}
    targets = [labels.target(item) for item in items]
    texts = [list(column) for column in zip(*(i.texts for i in items), strict=True)]
    plain: dict[str, Any] = {"add_special_tokens": True, "verbose": False}
    whole = tokenizer(*texts, **plain)["input_ids"]
    if length < min(4, max(map(len, whole))):
        raise InputError(f"data.length {length} has no room for a text; raise it")
    encoded = tokenizer(
        *texts,
        **plain,
        truncation=True,
        max_length=length,
        padding="max_length",
        return_token_type_ids=True,
        return_attention_mask=True,
    )
    shape = (len(items), 1)
    batch = {
        "tokens": np.asarray(encoded["input_ids"], np.int32),
        "mask": np.asarray(encoded["attention_mask"], np.int32),
        "token_types": np.asarray(encoded["token_type_ids"], np.int32),
        "targets": np.asarray(targets, kinds[labels.problem]).reshape(shape),
        "weights": np.ones(shape, np.float32),
    }
    return batch, sum(len(ids) > length for ids in whole)


def _classes(count: int, names: tuple[str, ...]) -> Labels:
    if count < 2:
        raise InputError(
            f"the labels have {count} class; a classification needs at least two"
        )
    return Labels("classification", count, names)


def _item(row: Any, where: str) -> Labelled:
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where} is a {type(row).__name__}; each row must be an object with texts "
            'and a "label"'
        )
    fields = next((names for names in TEXT_FIELDS if row.keys() >= {*names}), None)
    has = f"it has: {', '.join(map(str, row)) or 'nothing'}"
    if fields is None:
        known = "; ".join(", ".join(names) for names in TEXT_FIELDS)
        raise InputError(f"{where} has the fields of no known texts ({known}); {has}")
    if "label" not in row:
        raise InputError(f'{where} has no field "label" ({has})')
    for name in fields:
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(f'{where}: field "{name}" is no text: {row[name]!r}')
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise InputError(f"{where}: label {label!r} is no word and no number")
    if isinstance(label, str) and not label:
        raise InputError(f'{where}: field "label" is empty')
    if isinstance(label, int) and label < 0:
        raise InputError(
            f"{where}: label {label} says that there is none, as in GLUE's test files; "
            "give a file with labels"
        )
    return Labelled(tuple(row[name] for name in fields), label, where)
