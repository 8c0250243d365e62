from __future__ import annotations

import json

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.tasks import (
    ANSWER_PATTERNS,
    answer_pattern,
    exact_match,
    extract_answer,
)


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", ""),
        ("piqa", "solution2", "solution2"),
        ("piqa", "solution3", ""),
        ("social_i_qa", "I think answer3.", "answer3"),
        ("openbookqa", "answer5 or answer1", "answer5"),
        ("openbookqa", "answer6", ""),
        ("hellaswag", "ending4", "ending4"),
        ("hellaswag", "answer4", ""),
        ("winogrande", "option1", "option1"),
        ("ARC-Easy", "### Response:\n answer1 ### Response:\n answer2", "answer2"),
        ("ARC-Challenge", "Answer: answer1\n### Response:\nnone", ""),
    ],
)
def test_first_match_of_the_response(task, text, answer):
    assert extract_answer(text, ANSWER_PATTERNS[task]) == answer


def test_without_a_pattern_the_whole_response_counts():
    assert extract_answer("go\n### Response:\n a red door \n") == "a red door"


def test_pattern_of_the_references():
    assert answer_pattern(["answer1", "answer4"]) == ANSWER_PATTERNS["openbookqa"]
    assert answer_pattern(["true"]) == ANSWER_PATTERNS["boolq"]
    assert answer_pattern(["true", "option1"]) is None


def test_exact_match_counts_every_item():
    figures = exact_match(
        ["it is true", "perhaps", "false", "true"],
        ["true", "true", "true", "true"],
        ANSWER_PATTERNS["boolq"],
    )
    assert figures == {"exact_match": 0.5, "count": 4, "unanswered": 1}
    free = exact_match([" red\n", "red door"], ["red", "red"])
    assert free == {"exact_match": 0.5, "count": 2, "unanswered": 0}


def test_bad_references():
    with pytest.raises(InputError, match="no answers"):
        exact_match([], [])
    with pytest.raises(InputError, match="item 2 has no reference answer"):
        exact_match(["a", "b"], ["a", ""])
    with pytest.raises(InputError, match=r"'maybe' is not one of true\|false"):
        exact_match(["true"], ["maybe"], "true|false")


@pytest.mark.shared
def test_real_outputs_hold_their_answers(shared):
    tasks = sorted((shared / "data" / "commonsense").glob("*/test.json"))
    assert len(tasks) == 7
    for path in tasks:
        rows = json.loads(path.read_text(encoding="utf-8"))
        outputs, answers = zip(*((r["output"], r["answer"]) for r in rows), strict=True)
        pattern = answer_pattern(answers)
        assert pattern == ANSWER_PATTERNS[path.parent.name]
        assert exact_match(outputs, answers, pattern)["exact_match"] == 1
