"""Encoding of records and text into arrays of tokens, targets and weights.

Encoded rows are {"tokens": (N, T) int32, "targets": (N, T) int32, "weights": (N, T)
float32}: position t reads tokens[t] and predicts targets[t] with weight weights[t].
Padding is on the right with weight 0, so a causal model needs no mask.

Prompt and output are encoded separately and then joined: no token crosses the boundary,
and a prompt has the same tokens in training and in generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.data.framing import Frame, Tokenizer, begin, frame_of, keep_end
from tsd_jax.data.sources import Record

Arrays = dict[str, np.ndarray]
"""{name: one array over all rows, (N, ...)}."""

Template = Callable[[Record], str]
"""Record -> prompt."""


@dataclass(frozen=True)
class Examples:
    """Encoded rows for training or evaluation.

    Attributes:
      arrays: tokens, targets and weights, each (N, T).
      rows: index of the record of each row, (N,).
      truncated: number of rows whose output was cut at the end.
      dropped: number of records left out because their prompt filled the length.
    """

    arrays: Arrays
    rows: np.ndarray
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Choices:
    """One row for each option of each record, to be ranked by likelihood.

    Attributes:
      arrays: tokens, targets and weights, each (R, T); weights are 1 on the option.
      groups: index of the record of each row, (R,).
      labels: index of the correct option among those of its record, (N,).
      truncated: number of records whose prompt was cut at the beginning.
    """

    arrays: Arrays
    groups: np.ndarray
    labels: np.ndarray
    truncated: int


@dataclass(frozen=True)
class Prompts:
    """Prompts padded on the left, for generation.

    Attributes:
      tokens: (N, T) int32.
      mask: True at real tokens, (N, T) bool.
      truncated: number of prompts that were cut at the beginning.
    """

    tokens: np.ndarray
    mask: np.ndarray
    truncated: int


def encode_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    length: int,
    *,
    train_on_prompt: bool = False,
) -> Examples:
    """Encode records as front + prompt + output + EOS, at most `length` + 1 tokens.

    The front is what the tokenizer puts before a text by itself, such as BOS.

    Args:
      records: to encode.
      tokenizer: of the model.
      template: makes the prompts.
      length: T, tokens of a row.
      train_on_prompt: give the prompt weight 1 as well, not only output and EOS.

    Raises:
      InputError: no prompt is short enough, or the tokenizer has no EOS token.
    """
    _check_length(length)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no EOS token; set its eos_token")
    frame = frame_of(tokenizer)
    prompts = _encode_prompts(records, tokenizer, template, frame)
    outputs = [
        [*ids, *frame.end] for ids in _encode(tokenizer, [r.output for r in records])
    ]
    rows = [n for n, prompt in enumerate(prompts) if len(prompt) <= length]
    if not rows:
        raise InputError(
            f"nothing to train on: none of {len(prompts)} records has any of its "
            f"output within length {length}; raise the length"
        )
    pairs = [(prompts[n], outputs[n]) for n in rows]
    return Examples(
        arrays=_pack(pairs, length, train_on_prompt),
        rows=np.asarray(rows, np.int32),
        truncated=sum(1 for p, o in pairs if len(p) + len(o) > length + 1),
        dropped=len(prompts) - len(rows),
    )


def encode_choices(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    length: int,
) -> Choices:
    """Encode every option of every record as front + prompt + option.

    An option is phrased as the output phrases the answer ("the correct answer is
    answer2"). If a row is too long, the beginning of the prompt is cut.

    Args:
      records: to encode.
      tokenizer: of the model.
      template: makes the prompts.
      length: T, tokens of a row.

    Raises:
      InputError: a record has fewer than two options, or its answer is not one of them,
        or an option alone is longer than `length`.
    """
    _check_length(length)
    for number, record in enumerate(records, start=1):
        _check_options(record, number)
    frame = frame_of(tokenizer)
    prompts = _encode_prompts(records, tokenizer, template, frame)
    groups = np.repeat(np.arange(len(records)), [len(r.options) for r in records])
    texts = [_phrase(record, option) for record in records for option in record.options]
    options = _encode(tokenizer, texts)
    pairs, cut = [], set()
    for group, text, option in zip(groups.tolist(), texts, options, strict=True):
        room = length + 1 - len(option)
        if room < 1:
            raise InputError(
                f"record {group + 1}: option {text!r} has {len(option)} tokens, "
                f"more than length {length}; raise the length"
            )
        if len(prompts[group]) > room:
            cut.add(group)
        pairs.append((keep_end(prompts[group], room, frame), option))
    return Choices(
        arrays=_pack(pairs, length, train_on_prompt=False),
        groups=groups.astype(np.int32),
        labels=np.asarray([r.options.index(r.answer) for r in records], np.int32),
        truncated=len(cut),
    )


def encode_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: Template,
    length: int | None = None,
) -> Prompts:
    """Encode prompts alone, padded on the left.

    Args:
      records: to encode.
      tokenizer: of the model.
      template: makes the prompts.
      length: T, tokens of a row; by default those of the longest prompt.

    Raises:
      InputError: there are no prompts, or the length is not positive.
    """
    frame = frame_of(tokenizer)
    prompts = _encode_prompts(records, tokenizer, template, frame)
    if not any(prompts):
        raise InputError("there are no prompts to encode")
    if length is None:
        length = max(map(len, prompts))
    _check_length(length)
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        ids = keep_end(prompt, length, frame)
        if ids:
            tokens[row, -len(ids) :] = ids
            mask[row, -len(ids) :] = True
    return Prompts(tokens, mask, sum(1 for p in prompts if len(p) > length))


def encode_text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the token ids of plain text, (N,) int32, without special tokens."""
    return np.asarray(_encode(tokenizer, [text])[0], np.int32)


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Split off the last `fraction` of the characters, to be held out.

    Raises:
      InputError: the fraction is not between 0 and 1, or a part would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(
            f"the held-out fraction is {fraction}; it must be between 0 and 1"
        )
    cut = len(text) - round(len(text) * fraction)
    if not 0 < cut < len(text):
        raise InputError(
            f"a text of {len(text)} characters is too short to hold out {fraction} of "
            "it; give more text or another fraction"
        )
    return text[:cut], text[cut:]


def windows(ids: np.ndarray, length: int) -> Arrays:
    """Split ids (N,) into (N - 1) // T disjoint windows of T = `length` tokens.

    Window i reads ids[i·T : i·T + T] and predicts each next id, so its last target is
    the first token of window i + 1: every id but the first is predicted exactly once.
    An incomplete window at the end is left out.

    Raises:
      InputError: the ids are too few for one window.
    """
    _check_length(length)
    count = (len(ids) - 1) // length
    if count < 1:
        raise InputError(
            f"the text has {len(ids)} tokens, too few for one window of {length} "
            f"(which needs {length + 1}); give more text or a shorter length"
        )
    shape = (count, length)
    return {
        "tokens": ids[: count * length].astype(np.int32).reshape(shape),
        "targets": ids[1 : count * length + 1].astype(np.int32).reshape(shape),
        "weights": np.ones(shape, np.float32),
    }


def _check_length(length: int) -> None:
    if length < 1:
        raise InputError(f"the length is {length}; it must be at least 1")


def _check_options(record: Record, number: int) -> None:
    if len(record.options) < 2:
        raise InputError(
            f"record {number} has {len(record.options)} options; give it two or more "
            "to rank"
        )
    if record.answer not in record.options:
        raise InputError(
            f"record {number}: answer {record.answer!r} is not among its options "
            f"{', '.join(record.options)}"
        )


def _phrase(record: Record, option: str) -> str:
    """Return the output with `option` in place of the answer at its end."""
    if record.output.endswith(record.answer):
        return record.output.removesuffix(record.answer) + option
    return option


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: no warning about texts longer than the model's context.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _encode_prompts(
    records: Sequence[Record], tokenizer: Tokenizer, template: Template, frame: Frame
) -> list[list[int]]:
    """Return the ids of prompts, with the frame's front."""
    prompts = _encode(tokenizer, [template(record) for record in records])
    return [begin(ids, frame) for ids in prompts]


def _pack(
    pairs: list[tuple[list[int], list[int]]], length: int, train_on_prompt: bool
) -> Arrays:
    """Return the rows of (prompt, output) pairs, padded on the right."""
    shape = (len(pairs), length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, (prompt, output) in enumerate(pairs):
        ids = (prompt + output)[: length + 1]
        end = len(ids) - 1
        tokens[row, :end] = ids[:-1]
        targets[row, :end] = ids[1:]
        weights[row, 0 if train_on_prompt else max(len(prompt) - 1, 0) : end] = 1
    return {"tokens": tokens, "targets": targets, "weights": weights}
