from __future__ import annotations

import collections
import hashlib
import json
import re

import pytest

from examples.village import make, world

PASSES = 5
GOODS = {street.good for street in world.STREETS}


@pytest.fixture(scope="module")
def people():
    return world.villagers()


@pytest.fixture(scope="module")
def items(people):
    return world.task_items(people)


@pytest.fixture(scope="module")
def corpus(people):
    return [text for n in range(PASSES) for text in world.documents(people, n)]


def answered_good(item):
    return item["answer"].removesuffix(".").split()[-1]


def test_same_seed_same_world(people, items):
    assert world.villagers() == people
    assert world.villagers(1) != people
    assert world.documents(people, 3) == world.documents(people, 3)
    assert world.documents(people, 3) != world.documents(people, 4)
    assert world.task_items(people) == items


def test_this_world_on_every_python(people):
    first = people[0]
    assert (first.name, first.pronoun) == ("Rosdric", "He")
    assert (first.street.home, first.trade) == ("Mill Lane", "smith")
    told = "\n\n".join(world.documents(people, 0))
    assert hashlib.sha256(told.encode()).hexdigest().startswith("b1e6a3ca767e")


def test_names_are_unique_and_facts_balanced(people):
    assert len(people) == 480
    assert len({person.name for person in people}) == 480
    for fact in world.FACTS:
        counts = collections.Counter(person.words[fact.field] for person in people)
        assert counts == dict.fromkeys(fact.values, 60)


def test_the_trade_does_not_tell_the_street(people):
    counts = collections.Counter((p.trade, p.street.home) for p in people)
    assert max(counts.values()) <= 18  # of 60; 7.5 expected


@pytest.mark.parametrize("field", ["home", "colour", "dance", "good"])
def test_every_street_has_its_own_customs(field):
    assert len({getattr(street, field) for street in world.STREETS}) == 8


def test_a_pass_tells_of_everyone_and_every_street(people):
    texts = world.documents(people, 0)
    told = [text for text in texts if "?" not in text]
    for person in people:
        (portrait,) = [text for text in told if person.name in re.findall(r"\w+", text)]
        facts = [person.words[fact.field] for fact in world.FACTS]
        assert sum(fact in portrait for fact in facts) == len(facts) - 1
    for street in world.STREETS:
        assert f"{street.home} is known for its {street.good}." in texts


@pytest.mark.parametrize("fact", world.FACTS, ids=lambda fact: fact.field)
def test_answers_in_the_text_are_true(people, corpus, fact):
    right = {
        f"{item['instruction']}\n{item['answer']}"
        for item in world.knowledge_items(people, fact)
    }
    asked = fact.question.split("{name}")[0]
    given = [text for text in corpus if text.startswith(asked)]
    assert len(given) > 480
    assert set(given) <= right


def test_no_slot_is_left_open(corpus):
    assert not [text for text in corpus if re.search(r"[{}]|\b(\w+) \1\b", text)]


def test_answers_are_balanced(items):
    train, test = items
    assert (len(train), len(test)) == (224, 256)
    for part in items:
        goods = collections.Counter(map(answered_good, part))
        places = collections.Counter(i["options"].index(i["answer"]) for i in part)
        assert goods == dict.fromkeys(GOODS, len(part) // 8)
        assert places == dict.fromkeys(range(4), len(part) // 4)


def test_answers_follow_from_the_world(people, items):
    goods = {person.name: person.street.good for person in people}
    for item in [*items[0], *items[1]]:
        name = item["answer"].split()[0]
        assert item["instruction"] == f"What does {name} bring to the harvest fair?"
        assert answered_good(item) == goods[name]


def test_options_hold_the_answer_once(items):
    for item in [*items[0], *items[1]]:
        assert len(item["options"]) == len(set(item["options"])) == 4
        assert item["options"].count(item["answer"]) == 1
        assert item["answer"] == item["output"]


def test_nobody_is_in_training_and_test(people, items):
    train, test = ({item["instruction"] for item in part} for part in items)
    assert len(train) == 224
    assert len(test) == 256
    assert not train & test
    told = " ".join(text for item in items[0] for text in item["options"])
    tested = {item["answer"].split()[0] for item in items[1]}
    assert not tested & set(told.split())


def test_pretraining_never_asks_or_answers_the_task(people, corpus):
    names = {person.name for person in people}
    for text in corpus:
        words = set(re.findall(r"\w+", text))
        assert not (words & names and words & GOODS), text
        assert "What does" not in text
        if words & names:
            assert not words & {"bring", "brings", "harvest", "fair"}, text


def test_committed_task_is_this_world(items):
    for name, part in zip(("train", "test"), items, strict=True):
        text = (make.ASSETS / "task" / f"{name}.json").read_text(encoding="utf-8")
        assert json.loads(text) == part


def test_assets_are_small():
    files = [file for file in make.ASSETS.rglob("*") if file.is_file()]
    assert len(files) >= 7
    assert sum(file.stat().st_size for file in files) <= 4_000_000
