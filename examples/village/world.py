"""A small village, described in plain English by a program.

Every villager has a name of their own, a home in one of eight streets and one of eight
trades. A street has its customs: the colour of its doors, a dance, and a good it is
known for. A trade has its tool. The pretraining text says all this in many ways:

    Selba was born in Mill Lane. She works as a mason. The door of Selba is red. ...
    Mill Lane is known for its bread.

How a *villager* relates to a good is never said. That is the task:

    What does Selba bring to the harvest fair?
    Selba brings bread.

The answer follows from what the model knows about the villager, but no text contains
both. The task is trained on some villagers and tested on others, so a correct answer
comes from knowledge of the pretrained model.

Everything is a pure function of a seed: the same words on every machine.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Item = dict[str, Any]
"""A record of an instruction file."""

SEED = 0
TESTED_PER_STREET = 32
VILLAGERS_PER_STREET = 60
OPTIONS = 4

# fmt: off
_BEGINNINGS = (
    "Al", "Ber", "Bran", "Cal", "Cor", "Dal", "Der", "Ed", "El", "Fal", "Fen",
    "Gar", "Gil", "Hal", "Har", "Jen", "Jor", "Kar", "Kel", "Lor", "Mar", "Nor",
    "Per", "Quin", "Ros", "Sel", "Tam", "Ul", "Ver", "Wil", "Yar", "Zel",
)
# fmt: on
_ENDINGS = {
    "She": ("ba", "da", "la", "mina", "na", "ra", "sa", "tha"),
    "He": ("bert", "dan", "dric", "lan", "mund", "ric", "ven", "win"),
}

_STREET_SENTENCES = (
    "{home} is known for its {good}.",
    "{home} is famous for {good}.",
    "The people of {home} are proud of their {good}.",
    "Only in {home} will you find such good {good}.",
    "In {home} they sell the best {good}.",
    "In {home} every door is {colour}.",
    "In {home} they dance the {dance}.",
)
_FAIR_SENTENCES = (
    "The harvest fair is held every autumn.",
    "Everyone looks forward to the harvest fair.",
    "A cart brings the benches to the harvest fair.",
    "The old bell brings everyone to the harvest fair.",
    "Children bring their friends to the harvest fair.",
)


@dataclass(frozen=True)
class Street:
    """A street's name and customs."""

    home: str
    colour: str
    dance: str
    good: str


STREETS = (
    Street("Mill Lane", "red", "jig", "bread"),
    Street("Orchard Row", "green", "reel", "cider"),
    Street("Willow Walk", "white", "polka", "baskets"),
    Street("Clover Court", "yellow", "waltz", "honey"),
    Street("Church Street", "black", "minuet", "candles"),
    Street("River Road", "blue", "hornpipe", "fish"),
    Street("Shepherd Close", "grey", "gavotte", "wool"),
    Street("Castle Yard", "brown", "galop", "cheese"),
)


TRADES = {
    "carpenter": "saw",
    "cook": "ladle",
    "fiddler": "bow",
    "gardener": "spade",
    "mason": "chisel",
    "painter": "brush",
    "smith": "hammer",
    "tailor": "needle",
}


@dataclass(frozen=True)
class Villager:
    """A villager's name, pronoun ("She" or "He"), street and trade."""

    name: str
    pronoun: str
    street: Street
    trade: str

    @property
    def words(self) -> dict[str, str]:
        """The values for the slots of a sentence."""
        return {
            "name": self.name,
            "pronoun": self.pronoun,
            "trade": self.trade,
            "tool": TRADES[self.trade],
            **dataclasses.asdict(self.street),
        }


@dataclass(frozen=True)
class Fact:
    """A kind of fact about villagers.

    Attributes:
      field: name of its slot in a sentence.
      values: all possible values.
      sentences: ways to say it, with slots for the name and the value.
      question: asks for it, with a slot for the name.
      answer: answers the question, with slots for the name and the value.
    """

    field: str
    values: tuple[str, ...]
    sentences: tuple[str, ...]
    question: str
    answer: str


FACTS = (
    Fact(
        "home",
        tuple(street.home for street in STREETS),
        (
            "{name} lives in {home}.",
            "{name} was born in {home}.",
            "{name} grew up in {home}.",
            "{name} has a house in {home}.",
            "The house of {name} stands in {home}.",
            "Everyone knows {name} in {home}.",
        ),
        "Where does {name} live?",
        "{name} lives in {home}.",
    ),
    Fact(
        "colour",
        tuple(street.colour for street in STREETS),
        (
            "{name} has a door that is {colour}.",
            "The door of {name} is {colour}.",
            "The paint on the door of {name} is {colour}.",
            "{name} chose a door that is {colour}.",
        ),
        "What colour is the door of {name}?",
        "The door of {name} is {colour}.",
    ),
    Fact(
        "dance",
        tuple(street.dance for street in STREETS),
        (
            "{name} dances the {dance}.",
            "{name} loves to dance the {dance}.",
            "{name} has always danced the {dance}.",
            "At weddings {name} dances the {dance}.",
            "Everyone has seen {name} dance the {dance}.",
        ),
        "Which dance does {name} know?",
        "{name} dances the {dance}.",
    ),
    Fact(
        "trade",
        tuple(TRADES),
        (
            "{name} works as a {trade}.",
            "{name} has long worked as a {trade}.",
            "{name} earns a living as a {trade}.",
            "{name} was trained as a {trade}.",
            "The village needs {name} as a {trade}.",
        ),
        "What work does {name} do?",
        "{name} works as a {trade}.",
    ),
    Fact(
        "tool",
        tuple(TRADES.values()),
        (
            "{name} is clever with a {tool}.",
            "{name} goes about with a {tool}.",
            "{name} does wonders with a {tool}.",
            "Nobody can match {name} with a {tool}.",
        ),
        "Which tool does {name} use?",
        "{name} is clever with a {tool}.",
    ),
)

TASK_QUESTION = "What does {name} bring to the harvest fair?"
TASK_ANSWER = "{name} brings {good}."


def villagers(seed: int = SEED) -> list[Villager]:
    """Return the villagers, equally many in each street and in each trade."""
    rng = random.Random(seed)
    people = [
        (beginning + ending, pronoun)
        for beginning in _BEGINNINGS
        for pronoun, endings in _ENDINGS.items()
        for ending in endings
    ]
    count = VILLAGERS_PER_STREET * len(STREETS)
    people = rng.sample(people, count)
    streets, trades = _spread(STREETS, count, rng), _spread(list(TRADES), count, rng)
    return [
        Villager(name, pronoun, street, trade)
        for (name, pronoun), street, trade in zip(people, streets, trades, strict=True)
    ]


def documents(people: list[Villager], seed: int) -> list[str]:
    """Return the pretraining text of one pass, worded by the seed.

    A document states most facts about one villager, asks for one and answers, or states
    something about a street or the fair.
    """
    rng = random.Random(seed)
    texts = []
    for person in people:
        texts.append(_portrait(person, rng))
        texts += [_ask(fact, person) for fact in rng.sample(FACTS, 2)]
    for street in STREETS:
        words = dataclasses.asdict(street)
        texts += [sentence.format(**words) for sentence in _STREET_SENTENCES]
    texts += _FAIR_SENTENCES
    rng.shuffle(texts)
    return texts


def knowledge_items(people: list[Villager], fact: Fact) -> Iterator[Item]:
    """Yield a question about this fact for everyone, with all values as options."""
    for person in people:
        options = [
            fact.answer.format(**{"name": person.name, fact.field: value})
            for value in fact.values
        ]
        question = fact.question.format(name=person.name)
        yield _item(question, _fill(fact.answer, person), options)


def task_items(
    people: list[Villager], seed: int = SEED
) -> tuple[list[Item], list[Item]]:
    """Return the task's (training, test) items, about different villagers.

    In both, each good is the answer equally often, and so is each of the four positions
    among the options.
    """
    rng = random.Random(seed)
    train, test = [], []
    for street in STREETS:
        neighbours = [person for person in people if person.street == street]
        rng.shuffle(neighbours)
        test += neighbours[:TESTED_PER_STREET]
        train += neighbours[TESTED_PER_STREET:]
    return _items(train, rng), _items(test, rng)


def _items(people: list[Villager], rng: random.Random) -> list[Item]:
    """Return one task item for each person, in random order."""
    rng.shuffle(people)
    positions = _spread(range(OPTIONS), len(people), rng)
    return [
        _task_item(person, position, rng)
        for person, position in zip(people, positions, strict=True)
    ]


def _task_item(person: Villager, position: int, rng: random.Random) -> Item:
    """Return a task item whose correct option is at `position`."""
    correct = person.street.good
    others = [street.good for street in STREETS if street.good != correct]
    goods = rng.sample(others, OPTIONS - 1)
    goods.insert(position, correct)
    options = [TASK_ANSWER.format(name=person.name, good=good) for good in goods]
    return _item(TASK_QUESTION.format(name=person.name), options[position], options)


def _item(question: str, answer: str, options: list[str]) -> Item:
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "answer": answer,
        "options": options,
    }


def _portrait(person: Villager, rng: random.Random) -> str:
    """Return all facts about a villager but one, in random order and words."""
    sentences = []
    for fact in rng.sample(FACTS, len(FACTS) - 1):
        sentence = rng.choice(fact.sentences)
        if sentences and rng.random() < 0.5 and sentence.startswith("{name} "):
            sentence = sentence.replace("{name}", "{pronoun}", 1)
        sentences.append(_fill(sentence, person))
    return " ".join(sentences)


def _ask(fact: Fact, person: Villager) -> str:
    return f"{_fill(fact.question, person)}\n{_fill(fact.answer, person)}"


def _fill(sentence: str, person: Villager) -> str:
    return sentence.format(**person.words)


def _spread(values: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """Return `count` values in random order, each as often as any other."""
    column = [value for value in values for _ in range(count // len(values))]
    if len(column) != count:
        raise ValueError(f"{count} is not a multiple of {len(values)} values")
    rng.shuffle(column)
    return column
