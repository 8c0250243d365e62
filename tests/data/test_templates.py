from __future__ import annotations

import pytest

from tsd_jax.data.sources import Record
from tsd_jax.data.templates import TEMPLATES

BARE = Record(instruction="Say hi.", input="", output="hi")
FULL = Record(instruction="Say hi.", input="To Ann.", output="hi Ann")
PAD = "                "

# What the authors' `generate_prompt` returns for an empty output, written out.
ALPACA_BARE = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.  \n"
    "\n"
    f"{PAD}### Instruction:\n"
    f"{PAD}Say hi.\n"
    f"{PAD}\n"
    f"{PAD}### Response:\n"
    f"{PAD}"
)
ALPACA_FULL = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request. \n"
    "\n"
    f"{PAD}### Instruction:\n"
    f"{PAD}Say hi.\n"
    f"{PAD}\n"
    f"{PAD}### Input:\n"
    f"{PAD}To Ann.\n"
    f"{PAD}\n"
    f"{PAD}### Response:\n"
    f"{PAD}"
)


@pytest.mark.parametrize(
    ("name", "record", "prompt"),
    [
        ("plain", BARE, "Say hi.\n"),
        ("plain", FULL, "Say hi.\nTo Ann.\n"),
        ("alpaca", BARE, ALPACA_BARE),
        ("alpaca", FULL, ALPACA_FULL),
    ],
)
def test_prompt_text(name, record, prompt):
    assert TEMPLATES[name](record) == prompt


def test_every_template_is_tested():
    assert set(TEMPLATES) == {"plain", "alpaca"}
