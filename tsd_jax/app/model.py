"""The base model: what is known of it before its weights are read, and the weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tsd_jax import huggingface
from tsd_jax.app.data import DataFiles
from tsd_jax.app.settings import ModelSettings
from tsd_jax.app.split_decoder import split_decoder
from tsd_jax.binding.linen import adapted
from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization, quantize
from tsd_jax.core.types import Progress
from tsd_jax.data.classification import Labels
from tsd_jax.evaluation.chunked_loss import SplitModel
from tsd_jax.huggingface.factors import ModuleName
from tsd_jax.huggingface.families.encoders import default_names
from tsd_jax.huggingface.families.family import Family, ModelConfig
from tsd_jax.models.decoder import Decoder
from tsd_jax.models.encoder_config import PROBLEM_TYPES, EncoderConfig
from tsd_jax.storage.adapter_file import BaseFacts
from tsd_jax.training import sharding


@dataclass(frozen=True)
class Added:
    """Tokens that the stored model does not have.

    Attributes:
      rows: (start, stop) of their ids.
      before: rows the stored model has.
    """

    rows: tuple[int, int]
    before: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model before its weights are read.

    Attributes:
      name: for the adapter's config: a hub id, or the folder in full.
      revision: of the hub id, or None.
      folder: of its files.
      config: with the head that the data asks for, and rows for added tokens.
      network: the Linen module.
      tokenizer: of transformers, with the added tokens.
      params: abstract tree, in the dtype asked for, quantized if it will be.
      apply: the network's apply function with adapters.
      split: a decoder in two parts, with adapters; None for an encoder.
      family: of the model.
      labels: of a classification or regression, or None.
      absent: the head's parameters that start at random.
      new_head: whether the head's last layer starts afresh whatever the files have.
      added: tokens that the stored model does not have, or None.
      quantization: of its linear layers, or None.
    """

    name: str
    revision: str | None
    folder: Path
    config: Any
    network: Any
    tokenizer: Any
    params: Mapping[str, Any]
    apply: Callable
    split: SplitModel | None
    family: Family
    labels: Labels | None
    absent: tuple[str, ...]
    new_head: bool
    added: Added | None
    quantization: Quantization | None

    @property
    def module_name(self) -> ModuleName:
        """The function from a parameter's path to the name of its torch module."""
        return functools.partial(
            huggingface.module_name, model_type=self.config.model_type
        )

    @property
    def facts(self) -> BaseFacts:
        """What the adapter's file records of the model."""
        return facts_of(self.config)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the model, a line each."""
        if self.labels is None:
            return []
        names = ", ".join(self.labels.names) or f"{self.labels.count} numbers"
        head = f"{self.labels.problem} ({names})"
        if not self.absent:
            return [f"{head} with the checkpoint's head"]
        return [f"{head}; started at random: {', '.join(sorted(self.absent))}"]


def facts_of(config: ModelConfig) -> BaseFacts:
    """Return what an export needs to know of a model.

    Args:
      config: of the model.
    """
    return BaseFacts(
        model_type=config.model_type,
        peft_task=huggingface.family_of(config).kind.peft_task,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def open_model(settings: ModelSettings, files: DataFiles) -> Base:
    """Read a model's config, its tokenizer and the headers of its weights.

    Args:
      settings: which model, and how to hold it.
      files: the data, whose labels its head predicts.

    Raises:
      InputError: there is no such model, its files lack something, or it does not fit
        the data.
    """
    folder = huggingface.resolve(settings.path, settings.revision or None)
    stored = huggingface.read_config(folder)
    stored, labels = with_head(stored, files, new=settings.new_head)
    huggingface.check_checkpoint(folder, stored, new_head=settings.new_head)
    tokenizer = huggingface.load_tokenizer(folder)
    config, added = with_tokens(stored, tokenizer, settings.added_tokens)
    family, dtype = huggingface.family_of(config), jnp.dtype(settings.dtype)
    network = family.kind.network(
        config, dtype, dtype, scan_layers=settings.scan_layers, remat=settings.remat
    )
    absent: tuple[str, ...] = ()
    if labels is not None:
        absent = huggingface.absent_head(folder, config, new_head=settings.new_head)
    return Base(
        name=_name(settings.path, folder),
        revision=settings.revision or None,
        folder=folder,
        config=config,
        network=network,
        tokenizer=tokenizer,
        params=_abstract_params(settings, config, family),
        apply=adapted(network.apply),
        split=split_decoder(network) if isinstance(network, Decoder) else None,
        family=family,
        labels=labels,
        absent=absent,
        new_head=settings.new_head,
        added=added,
        quantization=settings.base_quantization(),
    )


def _name(path: str, folder: Path) -> str:
    """Return a name of the model that holds in every folder."""
    is_local = Path(path).expanduser().is_dir()
    return str(folder.resolve()) if is_local else path


def _abstract_params(
    settings: ModelSettings, config: ModelConfig, family: Family
) -> Mapping[str, Any]:
    """Return the shapes and types of the parameters as they will be held."""
    dtype, quantization = jnp.dtype(settings.dtype), settings.base_quantization()
    shapes = huggingface.abstract_params(config, scan_layers=settings.scan_layers)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    if quantization is None:
        return params
    return quantize(params, quantization, family.kind.linear)


def load_weights(
    base: Base,
    mesh: Mesh,
    shardings: Any,
    head_key: jax.Array,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load the weights onto a mesh, with a head and rows for added tokens.

    Args:
      base: the model.
      mesh: of the devices.
      shardings: of `base.params`.
      head_key: of the head's parameters that start at random.
      progress: called with bytes loaded and their number.
    """
    config, scan = base.config, base.network.scan_layers
    stored_shardings = shardings
    if base.added is not None:
        config = dataclasses.replace(config, vocab_size=base.added.before)
        shapes = huggingface.abstract_params(config, scan_layers=scan)
        rules = base.family.kind.rules
        stored_shardings = sharding.param_shardings(shapes, rules, mesh)
    params = huggingface.load_params(
        base.folder,
        config,
        dtype=base.network.param_dtype,
        scan_layers=scan,
        shardings=stored_shardings,
        quantization=base.quantization,
        head_key=None if base.labels is None else head_key,
        new_head=base.new_head,
        progress=progress,
    )
    if base.added is None:
        return params
    return huggingface.grow(params, base.added.rows, shardings)


def with_tokens(
    config: ModelConfig, tokenizer: Any, tokens: Sequence[str]
) -> tuple[ModelConfig, Added | None]:
    """Return the config with rows for new tokens, which the tokenizer learns.

    Args:
      config: of the stored model.
      tokenizer: of the model; it is changed.
      tokens: to add; may be empty.

    Raises:
      InputError: the model is an encoder, or a token is known already.
    """
    if not tokens:
        return config, None
    if isinstance(config, EncoderConfig):
        raise InputError(
            f"model.added_tokens: the vocabulary of a {config.model_type} cannot be "
            "extended here; leave it empty"
        )
    rows = huggingface.add_tokens(tokenizer, tokens)
    return huggingface.grown_config(config, rows), Added(rows, config.vocab_size)


def with_head(
    config: ModelConfig, files: DataFiles, *, new: bool = False
) -> tuple[Any, Labels | None]:
    """Return the config with a head for the labels of the data; decoders get none.

    Args:
      config: of the checkpoint.
      files: the data.
      new: whether the head's last layer starts afresh, whatever the checkpoint has.

    Returns:
      The config, and what the labels mean; None for a decoder.

    Raises:
      InputError: the model cannot be trained on this kind of data, or its head
        predicts other labels.
    """
    if not isinstance(config, EncoderConfig):
        _check_decoder(config, files, new)
        return config, None
    labels = files.labels(() if new else _own_names(config))
    if labels is None:
        raise InputError(
            f"the model is a {config.model_type}, an encoder, which writes no text: "
            "give it data.kind 'classification'"
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


def _check_decoder(config: ModelConfig, files: DataFiles, new_head: bool) -> None:
    """Raise InputError where a decoder is asked to classify."""
    if files.labelled:
        raise InputError(
            f"data.kind 'classification' needs an encoder (bert, roberta, "
            f"deberta-v2), and the model is a {config.model_type}"
        )
    if new_head:
        raise InputError(f"model.new_head: a {config.model_type} has no such head")


def _own_names(config: EncoderConfig) -> tuple[str, ...]:
    """Return the names of a checkpoint's labels, where they say something."""
    names = config.label_names
    return () if names == default_names(config.num_labels) else names


def _check_head(config: EncoderConfig, labels: Labels) -> None:
    """Raise InputError where the checkpoint's head has other labels than the data."""
    own = _own_names(config)
    fits = labels.count == config.num_labels and (
        not own or not labels.names or labels.names == own
    )
    if fits and config.problem_type == PROBLEM_TYPES[labels.problem]:
        return
    has = ", ".join(own) or f"{config.num_labels} labels"
    asks = ", ".join(labels.names) or f"{labels.count} labels"
    raise InputError(
        f"the checkpoint's head is for a {config.problem_type} ({has}), but the data "
        f"is a {labels.problem} ({asks}); model.new_head=True starts a new one"
    )
