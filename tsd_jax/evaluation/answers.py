"""Grading of generated text: find each item's answer, and compare it with its own.

How an answer is found is decided for each item, so that one file may hold several
tasks. The same finder reads the text and the reference: both are normalised alike.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

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

# A sign belongs to a number only where nothing is subtracted.
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ENDS_IN_A_NUMBER = re.compile(
    r"(?:####|\banswer(?: is)?:?)\s*[^\w\s]*\s*-?[\d,.]*\d\W*$", re.IGNORECASE
)
_IS_A_NUMBER = re.compile(rf"[^\w\s.-]?(?:{_NUMBER.pattern})\s*%?")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Find = Callable[[str], str]
"""Text -> the answer in it, normalised; "" where there is none."""


@dataclass(frozen=True)
class Reference:
    """What an item asks for.

    Attributes:
      output: the text that a model should write.
      answer: the part of it that is graded; "" for all of it.
      options: all possible answers; () for an open question.
      task: what the item belongs to; "" names it by its answers.
    """

    output: str
    answer: str = ""
    options: tuple[str, ...] = ()
    task: str = ""


@dataclass(frozen=True)
class Graded:
    """One item after grading.

    Attributes:
      found: the answer in the text; "" if there is none.
      expected: the answer of the reference.
      task: what the item belongs to.
    """

    found: str
    expected: str
    task: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.found == self.expected


def response(text: str) -> str:
    """Return what follows the last "### Response:", if there is one."""
    return text.rpartition("### Response:")[2]


def exact(text: str) -> str:
    """Return the text with its white space made single spaces."""
    return " ".join(text.split())


def normalized(text: str) -> str:
    """Return the words of a text: lower case, no punctuation, no articles.

    Source:
      SQuAD's official `evaluate-v1.1.py`.
    """
    return exact(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)))


def number(text: str) -> str:
    """Return the last number of a text, in one form: 3 for 3.0, "3,000" is 3000."""
    found = _NUMBER.findall(text)
    if not found:
        return ""
    value = Decimal(found[-1].replace(",", "")).normalize()
    return f"{value + 0:f}"  # no -0, no exponent


def first_match(pattern: str) -> Find:
    """Return the finder of a pattern's first match: its first group, if it has any.

    Raises:
      InputError: the pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"the answer pattern {pattern!r} is not a regular expression: {error}"
        ) from None

    def find(text: str) -> str:
        found = compiled.search(text)
        if found is None:
            return ""
        return exact(found[1 if compiled.groups else 0] or "")

    return find


def one_of(options: Sequence[str]) -> Find:
    """Return the finder of the first of some options, each as whole words."""
    longest_first = sorted(map(exact, options), key=len, reverse=True)
    words = "|".join(map(re.escape, longest_first))
    find = first_match(rf"(?<!\w)(?:{words})(?!\w)")
    return lambda text: find(exact(text))


FINDERS: Mapping[str, Find] = {
    "number": number,
    "exact": exact,
    "normalized": normalized,
}
"""Ways to find an answer that need no more than a text, by name."""


def after(phrase: str) -> Find:
    """Return the finder of what follows a phrase, or of all where it is missing."""
    words = exact(phrase)

    def find(text: str) -> str:
        return exact(text).rpartition(words)[2].strip() if words else exact(text)

    return find


def finder(reference: Reference, how: str = "") -> tuple[str, Find]:
    """Return how an item's answer is found: a name for it, and the finder.

    Where nothing is asked for, it is the first of these that finds the item's answer
    in its own output, so that whoever writes the output is right:
    the answers of the paper's tasks; the item's options; the last number, where the
    answer is one or the output ends as "The answer is 3" and "#### 3" do; the exact
    text after the words that come before the answer; the exact output, where the
    answer is somewhere in it.

    Args:
      reference: of the item.
      how: a name of `FINDERS`, "options", or a regular expression; "" to decide.

    Raises:
      InputError: the item has no options, `how` is not a regular expression, or it
        does not find the item's answer in its output.
    """
    answer = reference.answer or reference.output
    ways = [_asked_for(reference, how)] if how else _ways(reference, answer)
    for name, find in ways:
        found = find(response(reference.output))
        if found and found in (find(answer), exact(answer)):
            return name, find
    if not how and exact(answer) in (whole := exact(reference.output)) and whole:
        return "exact", exact
    raise InputError(
        f"its answer {answer!r} is not found in its output {reference.output!r}"
        + (f" by {how!r}; find answers in another way" if how else "")
    )


def _asked_for(reference: Reference, how: str) -> tuple[str, Find]:
    """Return a way to find answers by its name, or by a regular expression."""
    if how != "options":
        return how, FINDERS.get(how) or first_match(how)
    if not reference.options:
        raise InputError("it has no options: give it some, or find answers otherwise")
    return how, one_of(reference.options)


def _ways(reference: Reference, answer: str) -> list[tuple[str, Find]]:
    """Return the ways to find an item's answer, the most special one first."""
    options = reference.options
    ways: list[tuple[str, Find]] = [
        (pattern.replace("|", "/"), first_match(pattern))
        for pattern in ANSWER_PATTERNS.values()
        if all(re.fullmatch(pattern, each) for each in options or (exact(answer),))
    ]
    if options:
        ways.append(("options", one_of(options)))
    if _IS_A_NUMBER.fullmatch(answer.strip()) or _ENDS_IN_A_NUMBER.search(answer):
        ways.append(("number", number))
    before = reference.output.removesuffix(reference.answer)
    if before != reference.output:
        ways.append(("exact", after(before)))
    return ways


def grade(
    texts: Sequence[str], references: Sequence[Reference], how: str = ""
) -> list[Graded]:
    """Find the answers of generated texts, and those of their references.

    Args:
      texts: generated, one for each item; a prompt that ends in "### Response:" may
        stand in front.
      references: of the items.
      how: see `finder`.

    Raises:
      InputError: there are no items, or a reference holds no answer of its own.
    """
    if not references:
        raise InputError("there are no answers to compare with")
    graded = []
    pairs = zip(texts, references, strict=True)
    for position, (text, reference) in enumerate(pairs, start=1):
        name, find, expected = _expected(reference, how, position)
        task = reference.task or name
        graded.append(Graded(find(response(text)), expected, task))
    return graded


def check_references(references: Sequence[Reference], how: str = "") -> None:
    """Raise InputError unless every reference holds an answer to compare with.

    Args:
      references: of the items.
      how: see `finder`.
    """
    grade([""] * len(references), references, how)


def _expected(reference: Reference, how: str, position: int) -> tuple[str, Find, str]:
    """Return how an item's answer is found, and the right one."""
    try:
        name, find = finder(reference, how)
    except InputError as error:
        raise InputError(f"item {position}: {error}") from None
    return name, find, find(response(reference.output))


def exact_match(graded: Sequence[Graded]) -> dict[str, float]:
    """Return the share of right answers, and of each task where there are several.

    Args:
      graded: the items, at least one.

    Returns:
      "exact_match", "count", and "unanswered", the number of texts without an answer.
      With several tasks also "exact_match/TASK" of each, and "exact_match/mean" over
      the tasks.
    """
    figures: dict[str, float] = {
        "exact_match": _share(graded),
        "count": len(graded),
        "unanswered": sum(1 for each in graded if not each.found),
    }
    tasks: dict[str, list[Graded]] = {}
    for each in graded:
        tasks.setdefault(each.task, []).append(each)
    if len(tasks) > 1:
        shares = {task: _share(items) for task, items in sorted(tasks.items())}
        figures |= {f"exact_match/{task}": share for task, share in shares.items()}
        figures["exact_match/mean"] = sum(shares.values()) / len(shares)
    return figures


def _share(graded: Sequence[Graded]) -> float:
    return sum(1 for each in graded if each.is_right) / len(graded)
