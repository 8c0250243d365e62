"""Grading of generated text: extract the answer and compare it exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tsd_jax.core.errors import InputError

_NUMBERED = r"answer1|answer2|answer3|answer4|answer5"

# The answers of the paper's commonsense tasks, case-sensitive
# (Subspace-Tuning, `commonsense_evaluate.py`).
ANSWER_PATTERNS: dict[str, str] = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": _NUMBERED,
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "ARC-Easy": _NUMBERED,
    "ARC-Challenge": _NUMBERED,
    "openbookqa": _NUMBERED,
}


def answer_pattern(answers: Sequence[str]) -> str | None:
    """Return the pattern that all these reference answers match, or None."""
    for pattern in ANSWER_PATTERNS.values():
        if all(re.fullmatch(pattern, answer) for answer in answers):
            return pattern
    return None


def extract_answer(text: str, pattern: str | None = None) -> str:
    """Return the answer in generated text, which may include the prompt.

    Only the text after the last "### Response:" counts: the first match of the pattern
    ("" if there is none), or without a pattern all of it, stripped.
    """
    response = text.rpartition("### Response:")[2]
    if pattern is None:
        return response.strip()
    found = re.search(pattern, response)
    return found[0] if found else ""


def exact_match(
    texts: Sequence[str], answers: Sequence[str], pattern: str | None = None
) -> dict[str, float]:
    """Return the fraction of texts whose answer equals the reference.

    Args:
      texts: generated texts, one for each item.
      answers: reference answers.
      pattern: from `answer_pattern` or `ANSWER_PATTERNS`; None compares the whole
        stripped text.

    Returns:
      "exact_match", "count", and "unanswered", the number of texts without an answer.

    Raises:
      InputError: there are no items, or a reference does not match the pattern.
    """
    if not answers:
        raise InputError("there are no answers to compare with")
    for number, answer in enumerate(answers, start=1):
        if not answer:
            raise InputError(f"item {number} has no reference answer")
        if pattern is not None and not re.fullmatch(pattern, answer):
            raise InputError(
                f"item {number}: reference answer {answer!r} is not one of {pattern}"
            )
    found = [extract_answer(text, pattern) for text in texts]
    correct = sum(1 for a, b in zip(found, answers, strict=True) if a == b)
    return {
        "exact_match": correct / len(answers),
        "count": len(answers),
        "unanswered": found.count(""),
    }
