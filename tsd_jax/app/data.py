"""From data files to training batches and held-out items.

Files are read before the model is opened, for its head takes the labels they have;
they are encoded after that, for it takes the model's tokenizer.
"""

from __future__ import annotations

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
from tsd_jax.data.iteration import Batches, RandomWindows, hold_out
from tsd_jax.data.sources import Record, read_instructions, read_text
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


class DataFiles(Protocol):
    """Data files as they were read."""

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
    return KINDS[settings.kind](settings, seed)


class TextFiles:
    """Plain text, cut into windows."""

    labelled = False

    def __init__(self, settings: DataSettings, seed: int):
        self._length, self._seed = settings.length, seed
        text = read_text(settings.path)
        if settings.eval_path:
            self._text, self._held_out = text, read_text(settings.eval_path)
        else:
            self._text, self._held_out = encoding.split_text(text, settings.held_out)

    def labels(self, known: tuple[str, ...]) -> None:
        """Return None: text has no labels."""
        del known

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode the text to train on, and cut the rest into windows."""
        del labels
        ids = encoding.encode_text(self._text, tokenizer)
        held_out = encoding.encode_text(self._held_out, tokenizer)
        windows = encoding.windows(held_out, self._length)
        encoding.windows(ids[: self._length + 1], self._length)  # one fits, or refuse
        note = (
            f"{len(ids):,} tokens to train on, {len(windows['tokens']):,} windows held "
            "out"
        )
        return Data(
            kind="text",
            rows=lambda size: RandomWindows(ids, self._length, size, self._seed),
            loss=lambda model: next_token_loss(model, None),
            held_out=windows,
            notes=(note,),
            length=self._length,
        )


class InstructionFiles:
    """Records of instructions and outputs."""

    labelled = False

    def __init__(self, settings: DataSettings, seed: int):
        check_choice("data.template", settings.template, TEMPLATES)
        self._settings, self._seed = settings, seed
        records = read_instructions(settings.path)
        self._records, self._held_out = _split(
            records, read_instructions, settings, seed
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
        notes = [f"{count:,} examples to train on, {len(held_out):,} held out"]
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
        )


class LabelledFiles:
    """Labelled texts, or pairs of texts."""

    labelled = True

    def __init__(self, settings: DataSettings, seed: int):
        self._settings, self._seed = settings, seed
        self._all = read_labelled(settings.path)
        self._items, self._held_out = _split(self._all, read_labelled, settings, seed)

    def labels(self, known: tuple[str, ...]) -> Labels:
        """Return what the labels of the file to train on mean."""
        settings = self._settings
        return find_labels(self._all, settings.problem, known, settings.positive)

    def encode(self, tokenizer: Any, labels: Labels | None) -> Data:
        """Encode all items."""
        assert labels is not None
        length, held_out = self._settings.length, self._held_out
        arrays, cut = encode_labelled(self._items, tokenizer, labels, length)
        held, held_cut = encode_labelled(held_out, tokenizer, labels, length)
        count = len(self._items)
        notes = [f"{count:,} items to train on, {len(held_out):,} held out"]
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


KINDS: Mapping[str, Callable[[DataSettings, int], DataFiles]] = {
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


def _split(
    items: list[T],
    read: Callable[[str], list[T]],
    settings: DataSettings,
    seed: int,
) -> tuple[list[T], list[T]]:
    """Return the items to train on, and those to evaluate: another file's, or some."""
    if settings.eval_path:
        return items, read(settings.eval_path)
    count = max(round(len(items) * settings.held_out), 1)
    return hold_out(items, count, seed)
