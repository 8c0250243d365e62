"""From data files to what the loop calls: training batches and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tsd_jax.app.report import on_host
from tsd_jax.core.errors import InputError
from tsd_jax.core.types import LossFn
from tsd_jax.data import encoding
from tsd_jax.data.classification import (
    Labels,
    encode_labelled,
    find_labels,
    read_labelled,
)
from tsd_jax.data.encoding import Arrays
from tsd_jax.data.iteration import Batches, RandomWindows, hold_out
from tsd_jax.data.sources import Record, read_instructions, read_text
from tsd_jax.data.templates import TEMPLATES
from tsd_jax.evaluation.classification import LOSSES, SCORES, make_logits, predict
from tsd_jax.evaluation.generation import generate
from tsd_jax.evaluation.loss import next_token_loss, sequence_log_likelihood
from tsd_jax.evaluation.scoring import PlaceFn, choices, nll
from tsd_jax.evaluation.tasks import answer_pattern, exact_match

Evaluate = Callable[[Mapping[str, Any]], dict[str, float]]
"""Model variables -> {name: figure}."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Say what is trained and evaluated on; see configs/default.py for each key.

    labels: of a classification, of `labels_of`.
    """

    kind: str
    path: str
    eval_path: str
    problem: str
    held_out: float
    template: str
    length: int
    train_on_prompt: bool
    seed: int
    labels: Labels | None = None


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Say how it is evaluated; see configs/default.py for each key."""

    metric: str
    batch_size: int
    limit: int
    max_new_tokens: int


class Rows(Protocol):
    """Return batches as a pure function of the step."""

    def batch(self, step: int) -> Arrays:
        """Return the rows of batch `step`."""
        ...


@dataclass(frozen=True)
class Data:
    """Hold what was read and encoded.

    Attributes:
      rows: makes the training rows, from the batch size.
      windows: evaluation items as arrays, or None where they are records.
      records: evaluation records; empty for others.
      notes: what a user should know of the encoding, a line each.
      metrics: that serve the data.
      loss: makes the loss from the adapted apply function.
    """

    rows: Callable[[int], Rows]
    windows: Arrays | None
    records: list[Record]
    notes: tuple[str, ...]
    metrics: tuple[str, ...] = ("nll",)
    loss: Callable[[Callable[..., Any]], LossFn] = next_token_loss


def read_data(settings: DataSettings, tokenizer: Any) -> Data:
    """Read and encode the files a run needs.

    Raises:
      InputError: unknown kind or template, or the files do not serve.
    """
    if settings.kind not in KINDS:
        raise InputError(
            f"unknown data.kind {settings.kind!r}; choose one of {', '.join(KINDS)}"
        )
    if not settings.path:
        raise InputError("data.path is empty; name a data file")
    return KINDS[settings.kind](settings, tokenizer)


def _read_text(settings: DataSettings, tokenizer: Any) -> Data:
    text = read_text(settings.path)
    if settings.eval_path:
        held = read_text(settings.eval_path)
    else:
        text, held = encoding.split_text(text, settings.held_out)
    ids = encoding.encode_text(text, tokenizer)
    windows = encoding.windows(encoding.encode_text(held, tokenizer), settings.length)
    encoding.windows(ids[: settings.length + 1], settings.length)

    def rows(batch_size: int) -> Rows:
        return RandomWindows(
            ids,
            settings.length,
            batch_size,
            settings.seed,
        )

    held_rows = len(windows["tokens"])
    note = f"{len(ids):,} tokens to train on, {held_rows:,} windows held out"
    return Data(rows, windows, [], (note,))


def _read_instructions(settings: DataSettings, tokenizer: Any) -> Data:
    records = read_instructions(settings.path)
    if settings.eval_path:
        held = read_instructions(settings.eval_path)
    else:
        count = max(round(len(records) * settings.held_out), 1)
        records, held = hold_out(records, count, settings.seed)
    examples = encoding.encode_examples(
        records,
        tokenizer,
        _template(settings),
        settings.length,
        train_on_prompt=settings.train_on_prompt,
    )

    def rows(batch_size: int) -> Rows:
        return Batches(
            examples.arrays,
            batch_size,
            settings.seed,
        )

    notes = [f"{len(examples.rows):,} examples to train on, {len(held):,} held out"]
    if examples.truncated or examples.dropped:
        notes.append(
            f"data.length {settings.length} cuts the output of {examples.truncated:,} "
            f"examples and leaves out {examples.dropped:,} whose prompt fills it"
        )
    return Data(rows, None, held, tuple(notes), ("nll", "choices", "generate"))


def labels_of(settings: DataSettings, known: tuple[str, ...] = ()) -> Labels | None:
    """Say what the labels of the data mean; None where it has none.

    Args:
      settings: of the data. known: names of classes that the model's head has.

    Raises:
      InputError: the file cannot be read, or its labels do not serve.
    """
    if settings.kind != "classification" or not settings.path:
        return None
    return find_labels(read_labelled(settings.path), settings.problem, known)


def _read_classification(settings: DataSettings, tokenizer: Any) -> Data:
    labels = settings.labels
    assert labels is not None
    items = read_labelled(settings.path)
    if settings.eval_path:
        held = read_labelled(settings.eval_path)
    else:
        count = max(round(len(items) * settings.held_out), 1)
        items, held = hold_out(items, count, settings.seed)
    batch, cut = encode_labelled(items, tokenizer, labels, settings.length)
    held_batch, held_cut = encode_labelled(held, tokenizer, labels, settings.length)

    def rows(batch_size: int) -> Rows:
        return Batches(
            batch,
            batch_size,
            settings.seed,
        )

    notes = [f"{len(items):,} items to train on, {len(held):,} held out"]
    if cut or held_cut:
        notes.append(
            f"data.length {settings.length} cuts the texts of {cut:,} and "
            f"{held_cut:,} of them"
        )
    loss = LOSSES[labels.problem]
    return Data(rows, held_batch, [], tuple(notes), ("scores",), loss)


KINDS: Mapping[str, Callable[[DataSettings, Any], Data]] = {
    "text": _read_text,
    "instructions": _read_instructions,
    "classification": _read_classification,
}


def _template(settings: DataSettings) -> Callable[[Record], str]:
    if settings.template not in TEMPLATES:
        raise InputError(
            f"unknown data.template {settings.template!r}; "
            f"choose one of {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[settings.template]


@dataclass(frozen=True)
class EvalContext:
    """Hold what every metric needs.

    Attributes:
      data: of `read_data`. settings: of the data. eval: of the evaluation.
      tokenizer: of the model. apply_fn: adapted.
      place: puts a batch (B, T) on the devices.
    """

    data: Data
    settings: DataSettings
    eval: EvalSettings
    tokenizer: Any
    apply_fn: Callable
    place: PlaceFn

    @property
    def records(self) -> list[Record]:
        """The records to evaluate, within the limit."""
        return self.data.records[: self.eval.limit or None]


def make_evaluation(judge: EvalContext) -> Evaluate:
    """Encode the held-out items once, and give the function that scores them.

    Raises:
      InputError: unknown metric, or one the data does not serve.
    """
    if judge.eval.metric not in METRICS:
        raise InputError(
            f"unknown eval.metric {judge.eval.metric!r}; "
            f"choose one of {', '.join(METRICS)}"
        )
    if judge.eval.metric not in judge.data.metrics:
        raise InputError(
            f"eval.metric {judge.eval.metric!r} does not serve data.kind "
            f"{judge.settings.kind!r}, which has {', '.join(judge.data.metrics)}"
        )
    return METRICS[judge.eval.metric](judge)


def _nll(judge: EvalContext) -> Evaluate:
    arrays, left_out = judge.data.windows, 0
    if arrays is None:
        examples = encoding.encode_examples(
            judge.records,
            judge.tokenizer,
            _template(judge.settings),
            judge.settings.length,
        )
        arrays, left_out = examples.arrays, examples.dropped
    if judge.eval.limit:
        arrays = {name: array[: judge.eval.limit] for name, array in arrays.items()}
    loss_fn = next_token_loss(judge.apply_fn)
    size = judge.eval.batch_size

    def evaluate(variables: Mapping[str, Any]) -> dict[str, float]:
        figures = nll(loss_fn, variables, arrays, size, judge.place)
        return figures | ({"left_out": left_out} if left_out else {})

    return evaluate


def _choices(judge: EvalContext) -> Evaluate:
    encoded = encoding.encode_choices(
        judge.records,
        judge.tokenizer,
        _template(judge.settings),
        judge.settings.length,
    )
    score_fn = sequence_log_likelihood(judge.apply_fn)

    def evaluate(variables: Mapping[str, Any]) -> dict[str, float]:
        return choices(
            score_fn,
            variables,
            encoded.arrays,
            encoded.groups,
            encoded.labels,
            judge.eval.batch_size,
            judge.place,
        )

    return evaluate


def _generate(judge: EvalContext) -> Evaluate:
    prompts = encoding.encode_prompts(
        judge.records, judge.tokenizer, _template(judge.settings)
    )
    answers = [record.answer or record.output for record in judge.records]
    pattern = answer_pattern(answers)
    # Some models end a text by beginning another.
    ends = {judge.tokenizer.eos_token_id, judge.tokenizer.bos_token_id} - {None}

    def evaluate(variables: Mapping[str, Any]) -> dict[str, float]:
        texts = []
        for start in range(0, len(answers), judge.eval.batch_size):
            # The last batch is filled up with its own last row: one compiled shape.
            last = len(answers) - 1
            rows = np.minimum(np.arange(start, start + judge.eval.batch_size), last)
            batch = judge.place(
                {"tokens": prompts.tokens[rows], "mask": prompts.mask[rows]}
            )
            made = generate(
                judge.apply_fn,
                variables["params"],
                batch["tokens"],
                batch["mask"],
                max_new_tokens=judge.eval.max_new_tokens,
                eos_ids=tuple(sorted(ends)),
            )
            ids, lengths = on_host((made.tokens, made.lengths))
            fresh = range(min(judge.eval.batch_size, len(answers) - start))
            texts += [judge.tokenizer.decode(ids[r][: lengths[r]]) for r in fresh]
        return exact_match(texts, answers, pattern)

    return evaluate


def _scores(judge: EvalContext) -> Evaluate:
    arrays, labels = judge.data.windows, judge.settings.labels
    assert arrays is not None
    assert labels is not None
    held = {n: array[: judge.eval.limit or None] for n, array in arrays.items()}
    logits_fn = make_logits(judge.apply_fn)
    scores, size = SCORES[labels.problem], judge.eval.batch_size

    def evaluate(variables: Mapping[str, Any]) -> dict[str, float]:
        logits = predict(logits_fn, variables, held, size, judge.place)
        return scores(logits, held["targets"][:, 0])

    return evaluate


METRICS: Mapping[str, Callable[[EvalContext], Evaluate]] = {
    "nll": _nll,
    "choices": _choices,
    "generate": _generate,
    "scores": _scores,
}
