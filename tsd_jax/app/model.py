"""Return a model what the task asks for: rows for added tokens, or a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tsd_jax import huggingface
from tsd_jax.app.run import Added
from tsd_jax.app.task import DataSettings, labels_of
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface.families.encoders import default_names
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.models.encoder_config import PROBLEM_TYPES, EncoderConfig


def with_tokens(
    config: ModelConfig, tokenizer: Any, tokens: Sequence[str]
) -> tuple[ModelConfig, Added | None]:
    """Return the config rows for tokens, which the tokenizer learns.

    Raises:
      InputError: the model is an encoder, or a token is known already.
    """
    if not tokens:
        return config, None
    if isinstance(config, EncoderConfig):
        raise InputError(
            f"model.added_tokens: a {config.model_type} does not grow its vocabulary "
            "here; leave it empty"
        )
    rows = huggingface.add_tokens(tokenizer, tokens)
    return huggingface.grown_config(config, rows), Added(rows, config.vocab_size)


def with_head(
    config: ModelConfig, settings: DataSettings, *, new: bool = False
) -> tuple[Any, Labels | None]:
    """Return the config the labels of the data; decoders stay as they are.

    Args:
      config: of the checkpoint. settings: of the data.
      new: whether the head's last layer starts afresh, whatever the checkpoint has.

    Returns:
      The config, and what the labels mean; None of a decoder.

    Raises:
      InputError: the model does not serve this kind of data, or its head tells other
        labels apart.
    """
    if not isinstance(config, EncoderConfig):
        if settings.kind == "classification":
            raise InputError(
                f"data.kind 'classification' needs an encoder (bert, roberta, "
                f"deberta-v2), and the model is a {config.model_type}"
            )
        if new:
            raise InputError(f"model.new_head: a {config.model_type} has no such head")
        return config, None
    labels = labels_of(settings, () if new else _own_names(config))
    if labels is None:
        raise InputError(
            f"the model is a {config.model_type}, an encoder, which writes no text: "
            "give it data.kind 'classification' and a data.path"
        )
    if config.num_labels and not new:
        _check_head(config, labels)
    names = labels.names or (_own_names(config) if not new else ())
    headed = dataclasses.replace(
        config,
        num_labels=labels.count,
        label_names=names if labels.problem == "classification" else (),
        problem_type=PROBLEM_TYPES[labels.problem],
    )
    return headed, labels


def _own_names(config: EncoderConfig) -> tuple[str, ...]:
    """Return the names of a checkpoint's labels, where they say something."""
    names = config.label_names
    return () if names == default_names(config.num_labels) else names


def _check_head(config: EncoderConfig, labels: Labels) -> None:
    """Refuse to train a head on other labels than its own."""
    own = _own_names(config)
    fits = labels.count == config.num_labels and (
        not own or not labels.names or labels.names == own
    )
    if fits and config.problem_type == PROBLEM_TYPES[labels.problem]:
        return
    has = ", ".join(own) or f"{config.num_labels} labels"
    asks = ", ".join(labels.names) or f"{labels.count} labels"
    raise InputError(
        f"the checkpoint's head is of a {config.problem_type} ({has}), but the data is "
        f"a {labels.problem} ({asks}); model.new_head=True starts another one"
    )
