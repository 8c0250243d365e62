"""Prompt templates: functions from a record to the text that the model continues."""

from __future__ import annotations

from collections.abc import Callable

from tsd_jax.data.sources import Record

# The template of the paper's commonsense experiments was written inside indented
# code: the prompts have its indentation, trailing spaces included.
_INDENT = " " * 16


def plain(record: Record) -> str:
    """Return the instruction and the input, on separate lines."""
    parts = [part for part in (record.instruction, record.input) if part]
    return "\n".join(parts) + "\n"


def alpaca(record: Record) -> str:
    """Return the prompt of the paper's commonsense experiments, white space included.

    Source:
      LLM-Adapters, `finetune.py`; its two branches differ in the spaces after
      "request.".
    """
    if record.input:
        head = (
            "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes "
            "the request. "
        )
    else:
        head = (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  "
        )
    sections = [("Instruction", record.instruction)]
    if record.input:
        sections.append(("Input", record.input))
    sections.append(("Response", ""))
    body = f"\n{_INDENT}".join(
        f"\n{_INDENT}### {title}:\n{_INDENT}{text}" for title, text in sections
    )
    return f"{head}\n{body}"


TEMPLATES: dict[str, Callable[[Record], str]] = {"plain": plain, "alpaca": alpaca}
