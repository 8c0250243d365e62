"""From settings to the pieces of a run, all checked and no weights read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from tsd_jax import huggingface
from tsd_jax.app.caches import spectra_folder
from tsd_jax.app.data import Data, DataFiles, read_files
from tsd_jax.app.evaluation import EvalContext, Evaluate, make_evaluation
from tsd_jax.app.model import Base, open_model
from tsd_jax.app.settings import (
    AdapterSettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
)
from tsd_jax.app.start import Start, check_start, open_start
from tsd_jax.binding.linen import make_spec
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.spec import Spec
from tsd_jax.core.types import LossFn
from tsd_jax.data.framing import BoundedTokenizer
from tsd_jax.extraction.devices import host_device
from tsd_jax.extraction.settings import Extraction
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.full_tensors import check_modules
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import CACHE_RULES
from tsd_jax.training import sharding
from tsd_jax.training.loop import LoopConfig
from tsd_jax.training.optimizer import check_schedule, make_optimizer, make_schedule

_UNEVALUATED = "no evaluation: data.held_out is 0, and there is no data.eval_path"

BatchFn = Callable[[int], dict[str, jax.Array]]
"""step -> its batch on the mesh, leaves (micro-batches, examples, positions)."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The pieces of a run before its first step.

    Attributes:
      mesh: of the devices.
      base: the model.
      spec: what is adapted, and how.
      plan: when things happen.
      optimizer: of what trains.
      rates: {name: schedule of a learning rate}, for the log.
      extraction: how directions are extracted.
      batch: step -> training batch.
      loss_fn: (variables, micro-batch) -> (summed loss, counted targets).
      evaluate: variables -> figures; None where nothing is held out.
      digests: of the files that were read, as `check_digests` takes them.
      eos: id of the token that targets end with, or None where they do not.
      start: the adapter to start from, or None.
      notes: what a user should know of model and data, a line each.
    """

    mesh: Mesh
    base: Base
    spec: Spec
    plan: LoopConfig
    optimizer: optax.GradientTransformation
    rates: Mapping[str, optax.Schedule]
    extraction: Extraction
    batch: BatchFn
    loss_fn: LossFn
    evaluate: Evaluate | None
    digests: Mapping[str, str]
    eos: int | None
    start: Start | None
    notes: tuple[str, ...]


def prepare(settings: Settings, workdir: Path | None = None) -> Prepared:
    """Make the pieces of a run.

    Args:
      settings: of the run.
      workdir: its folder, which may hold a checkpoint; None for a new run.

    Raises:
      InputError: the settings do not suit the devices, the model or the data.
    """
    mesh = sharding.make_mesh(settings.mesh)
    start = open_start(settings, workdir)
    plan = loop_config(settings, launched=start is not None and start.launched)
    rates = schedules(settings.optimizer, plan)
    check_prelaunch(settings, plan, rates)
    files = read_files(settings.data, settings.seed)
    base = open_model(settings.model, files)
    spec = adapted_spec(settings, base)
    start_notes = check_start(start, settings.adapter, spec, base)
    extraction = Extraction(store=spectra_folder(settings))
    if spec.method.launches and extraction.on_hosts(None):
        host_device()  # refuses now, rather than at the launch
    tokenizer = BoundedTokenizer(base.tokenizer, base.config.vocab_size)
    data = files.encode(tokenizer, base.labels)
    unevaluated = [] if data.evaluated else [_UNEVALUATED]
    return Prepared(
        mesh=mesh,
        base=base,
        spec=spec,
        plan=plan,
        optimizer=optimizer(settings.optimizer, rates),
        rates=rates,
        extraction=extraction,
        batch=batch_source(settings.train, data, mesh),
        loss_fn=data.loss(base),
        evaluate=evaluation(settings, base, tokenizer, data, mesh),
        digests=digests(files, base),
        eos=data.eos,
        start=start,
        notes=(
            *base.notes,
            *start_notes,
            *data.notes,
            *beyond_positions(base.config, data.length),
            *unevaluated,
        ),
    )


def beyond_positions(config: ModelConfig, length: int) -> list[str]:
    """Return a warning where examples are longer than a decoder has seen."""
    trained = config.max_position_embeddings
    if not isinstance(config, DecoderConfig) or length <= trained:
        return []
    return [
        f"warning: data.length {length} is beyond the {trained} positions that the "
        "model was trained on (max_position_embeddings); what it computes there is "
        "untrained"
    ]


def digests(files: DataFiles, base: Base) -> dict[str, str]:
    """Return the digests of the data, and of the base's files."""
    of_base = huggingface.fingerprint(base.folder)
    return {
        **files.digests,
        **{f"model.path/{name}": each for name, each in of_base.items()},
    }


def loop_config(settings: Settings, *, launched: bool = False) -> LoopConfig:
    """Return when things happen; after a launch, none follows."""
    return LoopConfig(
        steps=settings.train.steps,
        launch_step=None if launched else settings.method.fixed_launch_step,
        auto_launch=None if launched else settings.auto_launch_config(),
        log_every=settings.train.log_every,
        eval_every=settings.eval.every,
        checkpoint_every=settings.train.checkpoint_every,
    )


def check_prelaunch(
    settings: Settings, plan: LoopConfig, rates: Mapping[str, optax.Schedule]
) -> None:
    """Raise InputError where nothing is learned before launch that it could rank by."""
    if settings.method.gradient_batches:
        return
    first = plan.launch_step
    if plan.auto_launch is not None:
        first = plan.auto_launch.launch_min
    if first is not None:
        check_schedule(rates["learning_rate"], first, settings.method.method())


def schedules(
    settings: OptimizerSettings, plan: LoopConfig
) -> dict[str, optax.Schedule]:
    """Return the schedules of the learning rates, by their names in the log."""
    peaks = {
        "learning_rate": settings.learning_rate,
        "gain_learning_rate": settings.gain_learning_rate,
    }
    if settings.full_learning_rate:
        peaks["full_learning_rate"] = settings.full_learning_rate
    return {
        name: make_schedule(
            peak,
            steps=plan.steps,
            warmup=settings.warmup,
            decay=settings.decay,
            restart=plan.launch_step if settings.restart else None,
        )
        for name, peak in peaks.items()
    }


def optimizer(
    settings: OptimizerSettings, rates: Mapping[str, optax.Schedule]
) -> optax.GradientTransformation:
    """Return the optimizer with its schedules."""
    return make_optimizer(
        **rates,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm or None,
    )


def adapted_spec(settings: Settings, base: Base) -> Spec:
    """Match the rules to the model's kernels and parameters, and fix the method."""
    adapter = settings.adapter
    rules = [
        *head_rules(adapter, base),
        adapter.rule(),
        *adapter.full_rules(),
        *token_rules(adapter, base),
    ]
    tokens = jax.ShapeDtypeStruct((1, settings.data.length), jnp.int32)
    variables, method = {"params": base.params}, settings.method.method()
    spec = make_spec(base.network.apply, variables, rules, tokens, method=method)
    check_modules(spec.full, spec.paths)
    return spec


def head_rules(settings: AdapterSettings, base: Base) -> list[Full]:
    """Return the rule that trains a classification head in full, unless told not to."""
    if base.labels is None:
        return []
    if settings.train_head:
        return [Full(pattern=base.family.head)]
    if base.absent:
        raise InputError(
            f"the checkpoint has no {base.absent[0]}, which starts at random: leave "
            "adapter.train_head True"
        )
    return []


def token_rules(settings: AdapterSettings, base: Base) -> list[Full]:
    """Return the rules that train the rows of added tokens, and of those named."""
    rows = base.added.rows if base.added is not None else None
    if settings.train_tokens:
        rows = named_rows(settings, base)
    if rows is None:
        return []
    taken = settings.full_params
    flat = paths.flatten(base.params)
    return [
        Full(pattern=re.escape(path), rows=rows, axis=axis)
        for path, axis in huggingface.TOKEN_AXES.items()
        if path in flat and not (taken and re.fullmatch(taken, path))
    ]


def named_rows(settings: AdapterSettings, base: Base) -> tuple[int, int]:
    """Return the range of the ids of tokens that train, added ones included."""
    if base.labels is not None:
        raise InputError(
            f"adapter.train_tokens: the tokens of a {base.config.model_type} train by "
            "adapter.full_params alone; leave it empty"
        )
    tokens = list(settings.train_tokens)
    if base.added is not None:
        tokens += base.tokenizer.convert_ids_to_tokens(list(range(*base.added.rows)))
    try:
        return huggingface.known_rows(base.tokenizer, tokens)
    except InputError as error:
        raise InputError(f"adapter.train_tokens: {error}") from error


def batch_source(settings: TrainSettings, data: Data, mesh: Mesh) -> BatchFn:
    """Return the function from a step to its batch on the mesh."""
    count = settings.micro_batches
    sharding.check_batch(settings.batch_size // count, mesh)
    rows = data.rows(settings.batch_size)

    def batch(step: int) -> dict[str, jax.Array]:
        stacked = {
            name: array.reshape(count, -1, *array.shape[1:])
            for name, array in rows.batch(step).items()
        }
        return sharding.place_batch(stacked, mesh)

    return batch


def evaluation(
    settings: Settings, base: Base, tokenizer: Any, data: Data, mesh: Mesh
) -> Evaluate | None:
    """Return the function from model variables to figures, if data are held out."""
    if not data.evaluated:
        return None
    sharding.check_batch(settings.eval.batch_size, mesh)
    axes = PartitionSpec(*sharding.BATCH[1:])
    context = EvalContext(
        data=data,
        settings=settings.eval,
        tokenizer=tokenizer,
        end_ids=huggingface.read_eos_ids(base.folder),
        seed=settings.seed,
        model=base,
        place=lambda batch: sharding.place_batch(batch, mesh, axes),
        place_cache=lambda cache: sharding.constrain(cache, CACHE_RULES, mesh),
    )
    return make_evaluation(context)
