from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.answers import (
    ANSWER_PATTERNS,
    FINDERS,
    Reference,
    check_references,
    exact_match,
    finder,
    first_match,
    grade,
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
def test_the_papers_tasks_take_the_first_match_of_the_response(task, text, answer):
    reference = Reference(ANSWER_PATTERNS[task].partition("|")[0])
    assert grade([text], [reference])[0].found == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8.0", "8"),
        ("The answer is 3", "3"),
        ("first 5, then $3,000.", "3000"),
        ("12 apples - 7 eaten = 5", "5"),
        ("it is -2.50!", "-2.5"),
        ("10-3", "3"),
        ("(4)-1", "1"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("100%", "100"),
        ("no number", ""),
    ],
)
def test_a_number_is_a_number(text, value):
    assert FINDERS["number"](text) == value


def test_normalized_texts():
    assert FINDERS["normalized"]("  The red,\n DOOR! ") == "red door"
    assert FINDERS["exact"]("yes\n") == "yes"
    assert FINDERS["exact"]("a  red\tdoor ") == "a red door"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (
            Reference("the correct answer is answer2", "answer2"),
            ANSWER_PATTERNS["ARC-Easy"],
        ),
        (Reference("false"), "true|false"),
        (Reference("it is red", "red", ("red", "blue")), "options"),
        (Reference("It is cold, so B.", "B", ("A", "B")), "options"),
        (Reference("1 and 2 make 3. The answer is 3", "3"), "number"),
        (Reference("7 * 8 = 56\n#### 56"), "number"),
        (Reference("8.0"), "number"),
        (Reference("it is a red door", "red door"), "exact"),
        (Reference("In 1969 they landed"), "exact"),
        (Reference("3 birds, and 4 eggs", "3"), "exact"),  # the last number is not it
    ],
)
def test_how_an_answer_is_found(reference, name):
    found, find = finder(reference)
    assert found == name.replace("|", "/")
    assert find(reference.output)


def test_a_text_is_read_as_its_reference_is():
    reference = Reference("it is a red door", "red door")
    texts = ["it is a red  door\n", "red door", "it is a blue door", ""]
    graded = grade(texts, [reference] * 4)
    assert [each.found for each in graded] == ["red door", "red door", "blue door", ""]
    assert [each.is_right for each in graded] == [True, True, False, False]
    letters = grade(["B", "A cat is B", "ABC"], [Reference("B", "B", ("A", "B"))] * 3)
    assert [each.found for each in letters] == ["B", "A", ""]


def test_options_are_found_in_other_white_space():
    reference = Reference("a red door", options=("a red", "a red door"))
    assert grade(["it is a  red\ndoor"], [reference])[0].is_right


def test_mixed_files_have_a_row_for_each_task():
    references = [
        Reference("the correct answer is true", "true"),
        Reference("the correct answer is solution2", "solution2"),
        Reference("the correct answer is false", "false"),
        Reference("so it is 4", "4", task="sums"),
    ]
    texts = [reference.output for reference in references]
    perfect = exact_match(grade(texts, references))
    assert perfect == {
        "exact_match": 1.0,
        "count": 4,
        "unanswered": 0,
        "exact_match/solution1/solution2": 1.0,
        "exact_match/sums": 1.0,
        "exact_match/true/false": 1.0,
        "exact_match/mean": 1.0,
    }
    figures = exact_match(grade([texts[0], "", "true", "4.0"], references))
    assert figures["exact_match"] == 0.5
    assert figures["unanswered"] == 1
    assert figures["exact_match/true/false"] == 0.5
    assert figures["exact_match/mean"] == (0 + 1 + 0.5) / 3


def test_one_task_has_one_figure():
    figures = exact_match(grade([" red\n", "red door"], [Reference("red")] * 2))
    assert figures == {"exact_match": 0.5, "count": 2, "unanswered": 0}


WORDS = st.text("abc .,!?-0123456789", min_size=1, max_size=12).filter(str.strip)
OPTIONS = st.lists(
    st.text("abcxyz", min_size=1, max_size=6), min_size=2, max_size=4, unique=True
)


@st.composite
def references(draw) -> Reference:
    kind = draw(st.sampled_from(["options", "number", "text", "part", "paper"]))
    if kind == "options":
        options = tuple(draw(OPTIONS))
        answer = draw(st.sampled_from(options))
        return Reference(f"it is {answer}", answer, options)
    if kind == "number":
        answer = str(draw(st.integers(-9999, 9999) | st.decimals(-9, 9, places=2)))
        return Reference(f"{draw(WORDS)}. The answer is {answer}", answer)
    if kind == "paper":
        answer = draw(st.sampled_from(["true", "answer4", "ending1", "option2"]))
        return Reference(f"the correct answer is {answer}", answer)
    if kind == "part":
        answer = draw(WORDS)
        return Reference(f"{draw(WORDS)} {answer}", answer)
    return Reference(draw(WORDS))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(items=st.lists(references(), min_size=1, max_size=8))
def test_who_writes_the_outputs_is_right_and_who_writes_nothing_is_not(items):
    perfect = exact_match(grade([item.output for item in items], items))
    assert perfect["exact_match"] == 1
    assert perfect["unanswered"] == 0
    silent = exact_match(grade([""] * len(items), items))
    assert silent["exact_match"] == 0
    assert silent["unanswered"] == len(items)


@pytest.mark.parametrize(
    ("reference", "how", "line"),
    [
        (Reference("a", "b"), "", "item 1: its answer 'b' is not found in its output"),
        (Reference("none"), "number", "is not found in its output 'none' by 'number'"),
        (Reference("red"), "options", "item 1: it has no options"),
        (Reference("red"), "(", "the answer pattern '(' is not a regular expression"),
        (Reference(" "), "", "item 1: its answer ' ' is not found in its output ' '"),
    ],
)
def test_references_that_hold_no_answer_are_refused(reference, how, line):
    with pytest.raises(InputError, match=re.escape(line)):
        check_references([reference], how)


def test_no_items_are_refused():
    with pytest.raises(InputError, match="there are no answers to compare with"):
        grade([], [])


def test_a_pattern_of_ones_own():
    reference = Reference("so [b] it is", "b")
    texts = ["[b] or [a]", "b", "[a]"]
    graded = grade(texts, [reference] * 3, r"\[(\w)\]")
    assert [each.found for each in graded] == ["b", "", "a"]
    assert first_match("x+")("axxb") == "xx"


@pytest.mark.shared
def test_real_outputs_hold_their_answers(shared):
    """Of the paper's tasks, mixed, and of GSM8K."""
    folder = shared / "data"
    rows = []
    for path in sorted((folder / "commonsense").glob("*/test.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    items = [Reference(row["output"], row["answer"]) for row in rows]
    figures = exact_match(grade([item.output for item in items], items))
    assert figures["exact_match"] == figures["exact_match/mean"] == 1
    assert len(figures) == 3 + 4 + 1  # four kinds of answers
    lines = (folder / "math" / "gsm8k" / "test.jsonl").read_text().splitlines()
    sums = [Reference(json.loads(line)["answer"]) for line in lines]
    graded = grade([item.output for item in sums], sums)
    assert {each.task for each in graded} == {"number"}
    final = [item.output.rpartition("#### ")[2].replace(",", "") for item in sums]
    assert [float(each.found) for each in graded] == list(map(float, final))
