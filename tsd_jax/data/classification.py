"""Labelled texts and pairs of texts, as in GLUE.

A file is read once, `items = read_labelled(path)`; `find_labels(items)` says what its
labels mean, and `encode_labelled(items, ...)` makes the arrays: "tokens", "mask" and
"token_types" (N, T) int32, "targets" (N, 1), int32 classes or float32 numbers, and
"weights" (N, 1) float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.data.encoding import Arrays
from tsd_jax.data.framing import Tokenizer
from tsd_jax.data.sources import Source, check_text, read_rows

# The fields of the texts in GLUE and BoolQ; the first match is taken.
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
_DTYPES = {"classification": np.int32, "regression": np.float32}

Label = str | int | float


@dataclass(frozen=True)
class Labelled:
    """One item: one text or two, with a label.

    Attributes:
      texts: one or two.
      label: name or number of a class, or the number to predict.
      where: file and row, for error messages.
    """

    texts: tuple[str, ...]
    label: Label
    where: str = ""


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set mean.

    Attributes:
      problem: one of `PROBLEMS`.
      count: number of classes; 1 for a regression.
      names: names of the classes, in order; () where labels are counted from 0.
      positive: of two classes, the one whose F1 is meant.
    """

    problem: str
    count: int
    names: tuple[str, ...] = ()
    positive: int = 1

    def target(self, item: Labelled) -> int | float:
        """Return the class or number that an item's label stands for.

        Raises:
          InputError: the label is not one of these.
        """
        label, where = item.label, item.where
        if self.names:
            name = _name(label)
            if name in self.names:
                return self.names.index(name)
            known = ", ".join(self.names)
            raise InputError(f"{where}: label {label!r} is not one of {known}")
        if isinstance(label, str):
            raise InputError(f"{where}: label {label!r} is not a number")
        if self.problem == "regression":
            return float(label)
        if label == int(label) and 0 <= label < self.count:
            return int(label)
        raise InputError(
            f"{where}: label {label!r} is not a class from 0 to {self.count - 1}"
        )


def read_labelled(path: Source) -> list[Labelled]:
    """Read a JSON list or JSON lines of labelled texts.

    Every row needs a `label` and the fields of one of `TEXT_FIELDS`; other fields are
    ignored. All rows need the same number of texts.

    Raises:
      InputError: the file is missing, empty or not JSON, or a row is malformed.
    """
    rows = read_rows(path)
    items = [_item(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]
    counts = [len(item.texts) for item in items]
    for number, count in enumerate(counts, start=1):
        if count != counts[0]:
            raise InputError(
                f"{path}, row {number} has {count} texts, but row 1 has {counts[0]}; "
                "give all rows the same number"
            )
    return items


def find_labels(
    items: Sequence[Labelled],
    problem: str = "",
    known: tuple[str, ...] = (),
    positive: str = "",
) -> Labels:
    """Return what the labels of some items mean.

    Words are classes: in the order of `known` if it has all of them, else sorted.
    Whole numbers (0.0 and 1.0 too) are classes: counted from 0 if they have no gaps,
    else those there are, by name. Fractions are a regression.

    Args:
      items: from `read_labelled`.
      problem: one of `PROBLEMS`; "" to decide by the labels.
      known: names of the classes of a checkpoint's head.
      positive: of two classes, the name or number of the one whose F1 is meant; "" for
        the second.

    Raises:
      InputError: unknown problem, words mixed with numbers, fewer than two classes,
        labels that are no classes, or no such positive class.
    """
    if problem not in ("", *PROBLEMS):
        raise InputError(
            f"unknown data.problem {problem!r}; choose {' or '.join(PROBLEMS)}, or '' "
            "to decide by the labels"
        )
    labels = {item.label for item in items}
    words = {label for label in labels if isinstance(label, str)}
    if words and words != labels:
        some = min(labels - words, key=repr)
        raise InputError(
            f"labels are words ({min(words)!r}) and numbers ({some!r}); use one kind"
        )
    if words and problem == "regression":
        raise InputError(f"label {min(words)!r} is not a number, as a regression needs")
    if words:
        names = known if words <= {*known} else tuple(sorted(words))
        return _classes(len(names), names, positive)
    numbers = sorted(label for label in labels if not isinstance(label, str))
    fractions = [number for number in numbers if number != int(number)]
    if problem == "regression" or (not problem and fractions):
        if positive:
            raise InputError(f"data.positive {positive!r}: a regression has no classes")
        return Labels("regression", 1)
    if fractions or numbers[0] < 0:
        bad = fractions[0] if fractions else numbers[0]
        raise InputError(
            f"label {bad!r} is no class: classes are whole numbers from 0, or words"
        )
    count = len(numbers)
    gaps = numbers != list(range(count))
    return _classes(count, tuple(map(_name, numbers)) if gaps else (), positive)


def encode_labelled(
    items: Sequence[Labelled],
    tokenizer: Tokenizer,
    labels: Labels,
    length: int,
) -> tuple[Arrays, int]:
    """Encode items with the tokenizer's special tokens, padded or cut to `length`.

    Of two texts the longer one is cut. The tokenizer decides the side of the padding.

    Args:
      items: from `read_labelled`.
      tokenizer: of the model.
      labels: what the labels mean, from `find_labels`.
      length: T, tokens of a row.

    Returns:
      The arrays of all items, and how many of them were cut.

    Raises:
      InputError: a label is not one of `labels`, or no text fits into the length.
    """
    targets = [labels.target(item) for item in items]
    texts = [list(column) for column in zip(*(i.texts for i in items), strict=True)]
    plain: dict[str, Any] = {"add_special_tokens": True, "verbose": False}
    uncut = tokenizer(*texts, **plain)["input_ids"]
    if length < min(4, max(map(len, uncut))):
        raise InputError(f"data.length {length} has no room for any text; raise it")
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
    arrays = {
        "tokens": np.asarray(encoded["input_ids"], np.int32),
        "mask": np.asarray(encoded["attention_mask"], np.int32),
        "token_types": np.asarray(encoded["token_type_ids"], np.int32),
        "targets": np.asarray(targets, _DTYPES[labels.problem]).reshape(shape),
        "weights": np.ones(shape, np.float32),
    }
    return arrays, sum(1 for ids in uncut if len(ids) > length)


def _name(label: Label) -> str:
    """Return a label as the name of a class: "1" for 1 and for 1.0."""
    whole = isinstance(label, float) and label == int(label)
    return str(int(label) if whole else label)


def _classes(count: int, names: tuple[str, ...], positive: str) -> Labels:
    """Return the labels of a classification, with its positive class."""
    if count < 2:
        raise InputError(
            f"the labels have {count} class; a classification needs two or more"
        )
    if not positive:
        return Labels("classification", count, names)
    all_names = names or tuple(map(str, range(count)))
    if count > 2:
        raise InputError(
            f"data.positive {positive!r}: F1 is the mean over {count} classes; leave "
            "it empty"
        )
    if positive not in all_names:
        raise InputError(
            f"data.positive {positive!r} is not one of {', '.join(all_names)}"
        )
    return Labels("classification", count, names, all_names.index(positive))


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
        raise InputError(f"{where} has no known text fields ({known}); {has}")
    if "label" not in row:
        raise InputError(f'{where} has no field "label" ({has})')
    for name in fields:
        if not isinstance(row[name], str) or not row[name].strip():
            raise InputError(f'{where}: field "{name}" is not a text: {row[name]!r}')
        check_text(row[name], f'{where}: field "{name}"')
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise InputError(f"{where}: label {label!r} is neither a word nor a number")
    if isinstance(label, str) and not label:
        raise InputError(f'{where}: field "label" is empty')
    check_text(str(label), f'{where}: field "label"')
    if isinstance(label, float) and not math.isfinite(label):
        raise InputError(f"{where}: label {label!r} is not a number")
    if isinstance(label, int) and label < 0:
        raise InputError(
            f"{where}: label {label} means no label, as in GLUE's test files; give a "
            "file with labels"
        )
    return Labelled(tuple(row[name] for name in fields), label, where)
