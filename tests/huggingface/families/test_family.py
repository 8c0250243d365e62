from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.small_llama import CONFIG
from tsd_jax.huggingface.families.family import Family

HEADLESS = Family(
    "AForX", {}, lambda _: {}, lambda _: {}, headless="A", also=("AForY",)
)
PLAIN = dataclasses.replace(HEADLESS, headless="", also=())


@dataclasses.dataclass
class Labelled:
    num_labels: int


@pytest.mark.parametrize(
    ("family", "accepted"),
    [(HEADLESS, ["AForX", "A", "AForY"]), (PLAIN, ["AForX"])],
)
def test_accepted_classes(family, accepted):
    assert family.accepted == accepted


@pytest.mark.parametrize(
    ("family", "labels", "architecture"),
    [(HEADLESS, 0, "A"), (HEADLESS, 2, "AForX"), (PLAIN, 0, "AForX")],
)
def test_the_class_that_a_config_describes(family, labels, architecture):
    assert family.architecture_of(Labelled(labels)) == architecture
    assert PLAIN.architecture_of(CONFIG) == "AForX"
