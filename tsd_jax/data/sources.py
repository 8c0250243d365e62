"""Reading of instruction files and plain text, with clear errors."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsd_jax.core.errors import InputError

# How the commonsense files of LLM-Adapters list the possible answers.
_ANSWER_FORMAT = re.compile(r"Answer format: (\S+(?:/\S+)+)\s*$")


@dataclass(frozen=True)
class DataFile:
    """A data file as it was read.

    Attributes:
      path: as the user gave it.
      text: what it holds.
      digest: SHA-256 of its bytes.
    """

    path: str
    text: str
    digest: str

    def __str__(self) -> str:
        return self.path


Source = str | Path | DataFile
"""Where data come from: a path, or a file that was read before."""


@dataclass(frozen=True)
class Record:
    """One item of an instruction file.

    Attributes:
      instruction: the task in words.
      input: further context; often empty.
      output: the text the model learns to write.
      answer: the part of the output that is graded; empty if none is.
      options: all possible answers; empty for an open question.
      task: what it belongs to, for a figure of its own; empty if not told.
    """

    instruction: str
    input: str
    output: str
    answer: str = ""
    options: tuple[str, ...] = ()
    task: str = ""


def read_instructions(path: Source) -> list[Record]:
    """Read a JSON list or JSON lines of instruction records.

    Every row needs a non-empty `instruction` and `output`; `input`, `answer`, `task`
    and `options` may be missing. Without `options`, they are taken from an
    "Answer format: a/b/c" at the end of the instruction. Other fields are ignored.

    Raises:
      InputError: the file is missing, empty or not JSON, or a row is malformed.
    """
    rows = read_rows(path)
    return [_record(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]


def read_rows(path: Source) -> list[Any]:
    """Read a JSON list, or one JSON value per line.

    Raises:
      InputError: the file is missing, empty or not JSON.
    """
    rows = _parse(read_text(path), path)
    if not rows:
        raise InputError(f"{path} has no rows; give a file with at least one")
    return rows


def read_text(path: Source) -> str:
    """Read plain UTF-8 text.

    Raises:
      InputError: the file is missing, not UTF-8, or only white space.
    """
    return path.text if isinstance(path, DataFile) else read_file(path).text


def read_file(path: str | Path) -> DataFile:
    """Read a file of UTF-8 text, opening it once: it may be a pipe.

    Raises:
      InputError: the file is missing, not UTF-8, or only white space.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the data file inside it")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise InputError(f"data file {path} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"data file {path} is empty")
    return DataFile(str(path), text, hashlib.sha256(content).hexdigest())


def _parse(text: str, path: Source) -> list[Any]:
    """Return the rows of a JSON list, or of one JSON value per line."""
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise _not_json(path, error.lineno, error.msg) from None
    rows = []
    # Split at newlines only: str.splitlines also splits at U+2028, valid in JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _not_json(path, number, error.msg) from None
    return rows


def _not_json(path: Source, line: int, why: str) -> InputError:
    return InputError(
        f"{path} is not JSON (line {line}: {why}); "
        "give a list of objects, or one object per line"
    )


def _record(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise InputError(
            f"{where} is a {type(row).__name__}; each row must be an object "
            'with the fields "instruction" and "output"'
        )
    instruction = _text(row, "instruction", where, required=True)
    return Record(
        instruction=instruction,
        input=_text(row, "input", where),
        output=_text(row, "output", where, required=True),
        answer=_text(row, "answer", where),
        options=_options(row, instruction, where),
        task=_text(row, "task", where),
    )


def _text(row: dict[str, Any], field: str, where: str, required: bool = False) -> str:
    if field not in row and required:
        raise InputError(
            f'{where} has no field "{field}" (it has: {", ".join(map(str, row))})'
        )
    value = row.get(field)
    value = "" if value is None else value
    if not isinstance(value, str):
        raise InputError(
            f'{where}: field "{field}" is a {type(value).__name__}, not a string'
        )
    if required and not value:
        raise InputError(f'{where}: field "{field}" is empty')
    check_text(value, f'{where}: field "{field}"')
    return value


def check_text(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, as a cut escape leaves it in JSON.

    Args:
      text: a field of a row.
      where: its file, row and name, for the message.

    Raises:
      InputError: the text is no Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half of a surrogate pair ({text[error.start]!r}) at "
            f"character {error.start}; mend or leave out the row"
        ) from None


def _options(row: dict[str, Any], instruction: str, where: str) -> tuple[str, ...]:
    if row.get("options") is None:
        announced = _ANSWER_FORMAT.search(instruction)
        return tuple(announced[1].split("/")) if announced else ()
    options = row["options"]
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise InputError(f'{where}: field "options" is not a list of strings')
    for option in options:
        check_text(option, f'{where}: field "options"')
    return tuple(options)
