"""From encoded data to the function that scores a model: one for every metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

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
from tsd_jax.evaluation.decoding import PlaceCache
from tsd_jax.evaluation.generation import generate
from tsd_jax.evaluation.scoring import PlaceFn, choices, nll

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
      end_ids: tokens that end a text, besides the tokenizer's.
      seed: of the samples.
      model: with its adapters.
      place: puts a batch (B, T) on the devices.
      place_cache: gives a decoder's cache its shardings, in a compiled program.
    """

    data: Data
    settings: EvalSettings
    tokenizer: Any
    end_ids: tuple[int, ...]
    seed: int
    model: Model
    place: PlaceFn
    place_cache: PlaceCache

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
    tokenizer, settings = context.tokenizer, context.settings
    padded = encoding.encode_prompts(context.records, tokenizer, context.template)
    prompts = [
        row[real].tolist() for row, real in zip(padded.tokens, padded.mask, strict=True)
    ]
    references = [
        Reference(record.output, record.answer, record.options, record.task)
        for record in context.records
    ]
    how = settings.answer
    check_references(references, how)
    # Some models end a text by beginning another.
    own = {tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    generation = settings.generation(tuple(sorted({*own, *context.end_ids})))
    key = jax.random.key(context.seed)

    def evaluate(variables: Mapping[str, Any]) -> Figures:
        texts = generate(
            context.model.apply,
            variables,
            prompts,
            generation,
            decode=tokenizer.decode,
            key=key,
            batch_size=settings.batch_size,
            place=context.place,
            place_cache=context.place_cache,
        )
        return exact_match(grade(texts, references, how))

    return evaluate


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
