"""From encoded data to the function that scores a model: one for every metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tsd_jax.app.data import Data, Model, next_token_loss
from tsd_jax.app.settings import EvalSettings
from tsd_jax.core.errors import InputError, check_choice
from tsd_jax.data import encoding
from tsd_jax.data.sources import Record
from tsd_jax.evaluation.answers import (
    Reference,
    check_references,
    exact_match,
    grade,
)
from tsd_jax.evaluation.chunked_loss import (
    chunked_sequence_log_likelihood,
    most_counted,
)
from tsd_jax.evaluation.classification import (
    classification_scores,
    make_logits,
    predict,
    regression_scores,
)
from tsd_jax.evaluation.generation import generate
from tsd_jax.evaluation.scoring import PlaceFn, choices, fetch, nll

Figures = dict[str, float]
"""{name: figure of an evaluation}."""

Evaluate = Callable[[Mapping[str, Any]], Figures]
"""Model variables -> figures."""


@dataclass(frozen=True)
class EvalContext:
    """What every metric needs.

    Attributes:
      data: encoded.
      settings: of the evaluation.
      tokenizer: of the model.
      model: with its adapters.
      place: puts a batch (B, T) on the devices.
    """

    data: Data
    settings: EvalSettings
    tokenizer: Any
    model: Model
    place: PlaceFn

    @property
    def records(self) -> Sequence[Record]:
        """The records to evaluate, within the limit."""
        return self.data.records[: self.settings.limit or None]

    @property
    def arrays(self) -> encoding.Arrays:
        """The encoded items to evaluate, within the limit."""
        assert self.data.held_out is not None
        limit = self.settings.limit or None
        return {name: array[:limit] for name, array in self.data.held_out.items()}

    @property
    def template(self) -> encoding.Template:
        """The template of the records' prompts."""
        assert self.data.template is not None
        return self.data.template


def make_evaluation(context: EvalContext) -> Evaluate:
    """Encode the held-out items once, and return the function that scores them.

    Raises:
      InputError: the metric is unknown, or cannot be computed of the data.
    """
    metric, data = context.settings.metric, context.data
    check_choice("eval.metric", metric, METRICS)
    if metric not in data.metrics:
        raise InputError(
            f"eval.metric {metric!r} cannot be computed of data.kind {data.kind!r}, "
            f"which has {', '.join(data.metrics)}"
        )
    return METRICS[metric](context)


def _nll(context: EvalContext) -> Evaluate:
    left_out: Figures = {}
    if context.data.held_out is None:
        data = context.data
        examples = encoding.encode_examples(
            context.records, context.tokenizer, context.template, data.length
        )
        arrays = examples.arrays
        if examples.dropped:
            left_out = {"left_out": examples.dropped}
    else:
        arrays = context.arrays
    loss_fn = next_token_loss(context.model, most_counted(arrays["weights"]))
    size = context.settings.batch_size

    def evaluate(variables: Mapping[str, Any]) -> Figures:
        return nll(loss_fn, variables, arrays, size, context.place) | left_out

    return evaluate


def _choices(context: EvalContext) -> Evaluate:
    encoded = encoding.encode_choices(
        context.records, context.tokenizer, context.template, context.data.length
    )
    assert context.model.split is not None
    score_fn = chunked_sequence_log_likelihood(
        context.model.split, counted=most_counted(encoded.arrays["weights"])
    )

    def evaluate(variables: Mapping[str, Any]) -> Figures:
        return choices(
            score_fn,
            variables,
            encoded.arrays,
            encoded.groups,
            encoded.labels,
            context.settings.batch_size,
            context.place,
        )

    return evaluate


def _generate(context: EvalContext) -> Evaluate:
    tokenizer = context.tokenizer
    prompts = encoding.encode_prompts(context.records, tokenizer, context.template)
    references = [
        Reference(record.output, record.answer, record.options, record.task)
        for record in context.records
    ]
    how = context.settings.answer
    check_references(references, how)

    def evaluate(variables: Mapping[str, Any]) -> Figures:
        texts: list[str] = []
        for start in range(0, len(references), context.settings.batch_size):
            texts += _continuations(context, prompts, start, variables["params"])
        return exact_match(grade(texts, references, how))

    return evaluate


def _continuations(
    context: EvalContext, prompts: encoding.Prompts, start: int, params: Any
) -> list[str]:
    """Return what the model writes after one batch of prompts."""
    size, tokenizer = context.settings.batch_size, context.tokenizer
    # The last batch is filled up with its own last row: one compiled shape.
    last = len(prompts.tokens) - 1
    rows = np.minimum(np.arange(start, start + size), last)
    batch = context.place({"tokens": prompts.tokens[rows], "mask": prompts.mask[rows]})
    # Some models end a text by beginning another.
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    made = generate(
        context.model.apply,
        params,
        batch["tokens"],
        batch["mask"],
        max_new_tokens=context.settings.max_new_tokens,
        eos_ids=tuple(sorted(ends)),
    )
    ids, lengths = jax.tree.map(fetch, (made.tokens, made.lengths))
    fresh = range(min(size, len(prompts.tokens) - start))
    return [tokenizer.decode(ids[row][: lengths[row]]) for row in fresh]


def _scores(context: EvalContext) -> Evaluate:
    labels, held_out = context.data.labels, context.arrays
    assert labels is not None
    logits_fn = make_logits(context.model.apply)
    size, targets = context.settings.batch_size, held_out["targets"][:, 0]

    def evaluate(variables: Mapping[str, Any]) -> Figures:
        logits = predict(logits_fn, variables, held_out, size, context.place)
        if labels.problem == "regression":
            return regression_scores(logits, targets)
        return classification_scores(logits, targets, labels.positive)

    return evaluate


METRICS: Mapping[str, Callable[[EvalContext], Evaluate]] = {
    "nll": _nll,
    "choices": _choices,
    "generate": _generate,
    "scores": _scores,
}
