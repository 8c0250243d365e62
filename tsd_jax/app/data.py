"""From data files to training batches and held-out items.

Files are read before the model is opened, for its head takes the labels they have;
they are encoded after that, for it takes the model's tokenizer.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tsd_jax.app.settings import DataSettings
from tsd_jax.core.errors import check_choice
from tsd_jax.core.types import LossFn
from tsd_jax.data import encoding
from tsd_jax.data.classification import (
    Labels,
    encode_labelled,
    find_labels,
    read_labelled,
)
from tsd_jax.data.encoding import Arrays, Template
from tsd_jax.data.framing import frame_of
from tsd_jax.data.iteration import Batches, RandomWindows, hold_out
from tsd_jax.data.sources import DataFile, Record, read_file, read_instructions
from tsd_jax.data.templates import TEMPLATES
from tsd_jax.evaluation.chunked_loss import (
    SplitModel,
    chunked_next_token_loss,
    most_counted,
)
from tsd_jax.evaluation.classification import LOSSES

T = TypeVar("T")


class Rows(Protocol):
    """Batches as a pure function of the step."""

    def batch(self, step: int) -> Arrays:
        """Return the rows of batch `step`."""
        ...


class Model(Protocol):
    """A model with adapters, as a loss needs it."""

    @property
    def apply(self) -> Callable[..., Any]:
        """The model's apply function."""
        ...

    @property
    def split(self) -> SplitModel | None:
        """A decoder in two parts; None for an encoder."""
        ...


@dataclass(frozen=True, kw_only=True)
class Data:
    """Encoded data.

    Attributes:
      kind: of data, for messages.
      rows: batch size -> training rows.
      held_out: items to evaluate as arrays, or None where they are records.
      records: to evaluate; empty where they are arrays.
      notes: what a user should know of the encoding, a line each.
      metrics: names of those that can be computed of the data.
      loss: model -> loss.
      template: of the records' prompts, or None.
      length: tokens of an example.
      labels: of a classification or regression, or None.
      eos: id of the token that targets end with, or None where they do not.
    """

    kind: str
    rows: Callable[[int], Rows]
    loss: Callable[[Model], LossFn]
    held_out: Arrays | None
    notes: tuple[str, ...]
    length: int
    records: Sequence[Record] = ()
    metrics: tuple[str, ...] = ("nll",)
    template: Template | None = None
    labels: Labels | None = None
    eos: int | None = None

    @property
    def evaluated(self) -> bool:
        """Whether there are items to evaluate."""
        return self.held_out is not None or bool(self.records)


class DataFiles(Protocol):
    """Data files as they were read."""

    digests: Mapping[str, str]
    """{config key: SHA-256 of the file it names}."""

    @property
    def labelled(self) -> bool:
        """Whether the items have labels, for a head to predict."""
        ...

    def labels(self, known: tuple[str, ...]) -> Labels | None:
        """Return what the labels mean; None where there are none.

        Args:
          known: names of the classes that the model's head has.
        """
        ...

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode the items.

        Args:
          tokenizer: of the model.
          labels: what `labels` returned.
        """
        ...


def read_files(settings: DataSettings, seed: int) -> DataFiles:
    """Read the files a run needs, each once.

    Args:
      settings: which they are.
      seed: of what is held out, and of the order of batches.

    Raises:
      InputError: the kind is unknown, or a file is missing or not of this kind.
    """
    check_choice("data.kind", settings.kind, KINDS)
    train = read_file(settings.path)
    held_out = None
    if settings.eval_path:
        same = settings.eval_path == settings.path
        held_out = train if same else read_file(settings.eval_path)
    return KINDS[settings.kind](settings, seed, train, held_out)


class _Files(abc.ABC):
    """What files of all kinds have.

    Args:
      settings: of the data.
      seed: of what is held out, and of the order of batches.
      train: the file to train on.
      held_out: the file to evaluate; None to hold out a share of the other.
    """

    labelled = False

    def __init__(
        self,
        settings: DataSettings,
        seed: int,
        train: DataFile,
        held_out: DataFile | None,
    ):
        self._settings, self._seed = settings, seed
        self._read(train, held_out)
        files = {"data.path": train, "data.eval_path": held_out}
        self.digests: Mapping[str, str] = {
            key: file.digest for key, file in files.items() if file is not None
        }

    @abc.abstractmethod
    def _read(self, train: DataFile, held_out: DataFile | None) -> None:
        """Take what is in the files."""

    def _split(
        self,
        items: list[T],
        held_out: DataFile | None,
        read: Callable[[DataFile], list[T]],
    ) -> tuple[list[T], list[T]]:
        """Return the items to train on, and those to evaluate."""
        if held_out is not None:
            return items, read(held_out)
        if not self._settings.held_out:
            return items, []
        count = max(round(len(items) * self._settings.held_out), 1)
        return hold_out(items, count, self._seed)


class TextFiles(_Files):
    """Plain text, cut into windows."""

    def _read(self, train: DataFile, held_out: DataFile | None) -> None:
        self._text, self._held_out = train.text, ""
        if held_out is not None:
            self._held_out = held_out.text
        elif share := self._settings.held_out:
            self._text, self._held_out = encoding.split_text(train.text, share)

    def labels(self, known: tuple[str, ...]) -> None:
        """Return None: text has no labels."""
        del known

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode the text to train on, and cut the rest into windows."""
        del labels
        length = self._settings.length
        ids = encoding.encode_text(self._text, tokenizer)
        encoding.windows(ids[: length + 1], length)  # one fits, or refuse
        windows, count = None, 0
        if self._held_out:
            held_out = encoding.encode_text(self._held_out, tokenizer)
            windows = encoding.windows(held_out, length)
            count = len(windows["tokens"])
        note = f"{len(ids):,} tokens to train on, {count:,} windows held out"
        return Data(
            kind="text",
            rows=lambda size: RandomWindows(ids, length, size, self._seed),
            loss=lambda model: next_token_loss(model, None),
            held_out=windows,
            notes=(note,),
            length=length,
        )


class InstructionFiles(_Files):
    """Records of instructions and outputs."""

    def _read(self, train: DataFile, held_out: DataFile | None) -> None:
        check_choice("data.template", self._settings.template, TEMPLATES)
        records = read_instructions(train)
        self._records, self._held_out = self._split(
            records, held_out, read_instructions
        )

    def labels(self, known: tuple[str, ...]) -> None:
        """Return None: instructions have no labels."""
        del known

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode the records to train on; a metric encodes the others as it needs."""
        del labels
        settings, held_out = self._settings, self._held_out
        template = TEMPLATES[settings.template]
        examples = encoding.encode_examples(
            self._records,
            tokenizer,
            template,
            settings.length,
            train_on_prompt=settings.train_on_prompt,
        )
        counted = most_counted(examples.arrays["weights"])
        count = len(examples.rows)
        notes = [
            f"{count:,} examples to train on, {len(held_out):,} held out",
            f"each is {_framed(tokenizer)}",
        ]
        if examples.truncated or examples.dropped:
            notes.append(
                f"data.length {settings.length} cuts the output of "
                f"{examples.truncated:,} examples and leaves out {examples.dropped:,} "
                "whose prompt fills it"
            )
        return Data(
            kind="instructions",
            rows=lambda size: Batches(examples.arrays, size, self._seed),
            loss=lambda model: next_token_loss(model, counted),
            held_out=None,
            notes=tuple(notes),
            length=settings.length,
            records=held_out,
            metrics=("nll", "choices", "generate"),
            template=template,
            eos=_target_eos(examples.arrays, tokenizer.eos_token_id),
        )


class LabelledFiles(_Files):
    """Labelled texts, or pairs of texts."""

    labelled = True

    def _read(self, train: DataFile, held_out: DataFile | None) -> None:
        self._all = read_labelled(train)
        self._items, self._held_out = self._split(self._all, held_out, read_labelled)

    def labels(self, known: tuple[str, ...]) -> Labels:
        """Return what the labels of the file to train on mean."""
        settings = self._settings
        return find_labels(self._all, settings.problem, known, settings.positive)

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode all items."""
        assert labels is not None
        length, held_out = self._settings.length, self._held_out
        arrays, cut = encode_labelled(self._items, tokenizer, labels, length)
        held, held_cut = None, 0
        if held_out:
            held, held_cut = encode_labelled(held_out, tokenizer, labels, length)
        notes = [f"{len(self._items):,} items to train on, {len(held_out):,} held out"]
        if cut or held_cut:
            notes.append(
                f"data.length {length} cuts the texts of {cut:,} and {held_cut:,} of "
                "them"
            )
        if labels.count == 2 and labels.names and not self._settings.positive:
            notes.append(
                f"f1 is that of {labels.names[1]!r}; data.positive names another class"
            )
        return Data(
            kind="classification",
            rows=lambda size: Batches(arrays, size, self._seed),
            held_out=held,
            notes=tuple(notes),
            length=length,
            metrics=("scores",),
            loss=lambda model: LOSSES[labels.problem](model.apply),
            labels=labels,
        )


KINDS: Mapping[str, Callable[..., DataFiles]] = {
    "text": TextFiles,
    "instructions": InstructionFiles,
    "classification": LabelledFiles,
}


def next_token_loss(model: Model, counted: int | None) -> LossFn:
    """Return the loss of a decoder.

    Args:
      model: the decoder.
      counted: the most positions of a row that count; None for all.
    """
    assert model.split is not None
    return chunked_next_token_loss(model.split, counted=counted)


def _framed(tokenizer: Any) -> str:
    """Return how an example is written, special tokens spelled out."""
    frame = frame_of(tokenizer)
    front, end = (tokenizer.convert_ids_to_tokens([*ids]) for ids in frame)
    return " ".join([*front, "prompt output", *end])


def _target_eos(arrays: Arrays, eos: int) -> int | None:
    """Return the id of EOS if a target is it; cut outputs have none."""
    asked = (arrays["targets"] == eos) & (arrays["weights"] > 0)
    return eos if asked.any() else None
