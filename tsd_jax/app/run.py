"""One run from its prepared parts to its artifacts: load, train, evaluate, export."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from tsd_jax import huggingface
from tsd_jax.app import report
from tsd_jax.app.export import ADAPTER
from tsd_jax.app.task import Evaluate
from tsd_jax.binding.linen import bind_variables
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization
from tsd_jax.core.spec import Spec
from tsd_jax.core.types import LossFn
from tsd_jax.data.classification import Labels
from tsd_jax.extraction.settings import Extraction
from tsd_jax.huggingface.families.family import Family
from tsd_jax.huggingface.full_tensors import neighbours
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.storage import run_files
from tsd_jax.storage.adapter_file import save_adapter
from tsd_jax.storage.atomic import read_json_or_empty, write_json
from tsd_jax.storage.directions_file import write_rankings
from tsd_jax.training import loop, processes, sharding
from tsd_jax.training.auto_launch import DirectionMonitor
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.gradient_discovery import KernelGradients
from tsd_jax.training.recorder import LoadingBar, Recorder
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import launch_state, make_train_step

Figures = dict[str, float]

# What may change between two parts of one run without changing its result.
_FREE = (
    "cache_dir",
    "cache_spectra",
    "cache_spectra_gb",
    "mesh",
    "eval.every",
    "train.checkpoint_every",
    "train.log_every",
)


@dataclass(frozen=True)
class Added:
    """Hold what tokens were added.

    Attributes:
      rows: (start, stop) of their ids. before: rows the stored model has.
    """

    rows: tuple[int, int]
    before: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """Hold the model before its weights are read.

    Attributes:
      name: for the adapter's config: a hub id, or the folder in full.
      folder: where it lies. network: the Linen module. tokenizer: of transformers.
      params: abstract tree, in the dtype asked for. apply: with adapters.
      family: of the model. labels: of a classification or regression; None without.
      new_head: whether the head's last layer starts afresh whatever the files have.
      added: tokens that the stored model does not have, or None.
      quantization: of its linear layers, or None.
    """

    name: str
    folder: Path
    network: Any
    tokenizer: Any
    params: Mapping[str, Any]
    apply: Callable
    family: Family
    labels: Labels | None = None
    new_head: bool = False
    added: Added | None = None
    quantization: Quantization | None = None

    @functools.cached_property
    def absent(self) -> tuple[str, ...]:
        """The parameters of the head that start at random."""
        if self.labels is None:
            return ()
        config = self.network.config
        return huggingface.absent_head(self.folder, config, new_head=self.new_head)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the model, a line each."""
        if self.labels is None:
            return []
        names = ", ".join(self.labels.names) or f"{self.labels.count} numbers"
        what = f"{self.labels.problem} ({names})"
        if not self.absent:
            return [f"{what} with the checkpoint's head"]
        return [f"{what}; started at random: {', '.join(sorted(self.absent))}"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Hold all that is fixed before the first step.

    Attributes:
      settings: flat, as recorded in config.json.
      workdir: of the run. mesh: of the devices. seed: of all randomness.
      base: the model. spec: what is adapted. epsilon: of the change rate.
      plan: when things happen.
      discovery_batches: of the gradient that directions are found by; 0 for the
        change that pre-launch made.
      optimizer: over the adapters. rates: {name: schedule}, for the log.
      batch: step -> placed batch. evaluate: variables -> figures.
      loss_fn: (variables, micro-batch) -> (summed loss, counted targets).
    """

    settings: Mapping[str, Any]
    workdir: Path
    mesh: Mesh
    seed: int
    base: Base
    spec: Spec
    epsilon: float
    extraction: Extraction
    plan: loop.LoopConfig
    optimizer: optax.GradientTransformation
    rates: Mapping[str, optax.Schedule]
    batch: Callable[[int], Any]
    evaluate: Evaluate
    loss_fn: LossFn
    discovery_batches: int = 0


@dataclass(frozen=True)
class Shardings:
    """Hold the shardings of the base and of the training state."""

    params: Any
    state: Any


def execute(run: Run) -> None:
    """Load the weights, train, evaluate, and write what the run leaves behind.

    Raises:
      InputError: the workdir belongs to another run, or the weights are not those of
        the model's config; nothing on disk has changed then.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(run.seed))
    head_key = None if run.base.labels is None else jax.random.fold_in(init_key, 1)
    goes_on = run_files.claim_workdir(run.workdir, run.settings, _FREE)
    goes_on = processes.broadcast_flag(goes_on)
    places = sharding.param_shardings(
        run.base.params, run.base.family.kind.rules, run.mesh
    )
    first = jax.process_index() == 0
    with LoadingBar(active=first) as bar:
        params = load_base(run.base, run.mesh, places, head_key, bar)
    if first:
        run.workdir.mkdir(parents=True, exist_ok=True)
        content = {"config": dict(run.settings), **report.environment()}
        if run.base.labels is not None:
            content["labels"] = dataclasses.asdict(run.base.labels)
        write_json(run.workdir / "config.json", content, sort_keys=True)
    _check_shared(run.workdir)
    with Checkpoints(run.workdir / "checkpoints") as checkpoints:
        saved = checkpoints if goes_on else None
        state, places = start(run, init_key, params, places, saved)
        with Recorder(
            run.workdir,
            steps=run.plan.steps,
            start=int(state.step),
            launched=bool(state.launched),
            active=first,
        ) as recorder:
            parts = make_parts(run, params, places, recorder)
            before = evaluated(recorder, parts, state, at=0)
            state, watch = loop.run(
                state, params, dropout_key, parts, run.plan, recorder, checkpoints
            )
            after = evaluated(recorder, parts, state, at=run.plan.steps)
            finish(run, state, params, recorder, watch, before, after)


def load_base(
    base: Base,
    mesh: Mesh,
    places: Any,
    head_key: jax.Array | None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Load the weights, and give them rows for added tokens, or a head by its key."""
    config, scan = base.network.config, base.network.scan_layers
    at = places
    if base.added is not None:
        config = dataclasses.replace(config, vocab_size=base.added.before)
        shapes = huggingface.abstract_params(config, scan_layers=scan)
        at = sharding.param_shardings(shapes, base.family.kind.rules, mesh)
    params = huggingface.load_params(
        base.folder,
        config,
        dtype=base.network.param_dtype,
        scan_layers=scan,
        shardings=at,
        quantization=base.quantization,
        head_key=head_key,
        new_head=base.new_head,
        progress=progress,
    )
    if base.added is None:
        return params
    return huggingface.grow(params, base.added.rows, places)


def _check_shared(workdir: Path) -> None:
    """Raise InputError unless all processes see the first one's workdir."""
    processes.wait_for_all("config.json")
    if not (workdir / "config.json").exists():
        raise InputError(
            f"workdir {workdir} is not the first process's folder here: give one that "
            "all processes share"
        )


def start(
    run: Run, key: jax.Array, params: Any, base: Any, checkpoints: Checkpoints | None
) -> tuple[TrainState, Shardings]:
    """Create the state where it shall lie, or restore the newest one.

    Args:
      run: all that is fixed. key: for the adapters.
      params: the base's tree, and `base` its shardings.
      checkpoints: where the newest may be; None for a new run.
    """

    def create(key: jax.Array, params: Any) -> TrainState:
        auto_launch = run.plan.auto_launch
        return create_state(key, run.spec, run.optimizer, auto_launch, params=params)

    abstract = jax.eval_shape(create, key, params)
    places = sharding.state_shardings(abstract, run.spec, base, run.mesh)
    if checkpoints is None or checkpoints.latest is None:
        state = jax.jit(create, out_shardings=places)(key, params)
        return state, Shardings(base, places)
    template = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        abstract,
        places,
    )
    return checkpoints.restore(template), Shardings(base, places)


def make_parts(
    run: Run, params: Any, places: Shardings, recorder: Recorder
) -> loop.LoopCallbacks:
    """Build what the loop calls."""
    loss_fn = run.loss_fn
    step = make_train_step(
        loss_fn,
        bind_variables,
        run.optimizer,
        dropout=any(kernel.dropout > 0 for kernel in run.spec.kernels),
        state_shardings=places.state,
        param_shardings=places.params,
        batch_shardings=NamedSharding(run.mesh, sharding.BATCH),
    )

    watching: list[DirectionMonitor] = []

    def settle(state: TrainState) -> TrainState:
        if not watching:
            config = run.plan.auto_launch
            assert config is not None
            watching.append(
                DirectionMonitor(params, run.spec, config, epsilon=run.epsilon)
            )
        return state.replace(monitor=watching[0](state.monitor, state.trainable))

    def launch(state: TrainState):
        watching.clear()  # and with it the spectra it holds
        changes = None
        if run.discovery_batches:
            steps = range(int(state.step), int(state.step) + run.discovery_batches)
            batches = [run.batch(step) for step in steps]
            changes = KernelGradients(
                loss_fn, bind_variables, state, params, run.spec, batches
            )
        return launch_state(
            state,
            params,
            run.spec,
            epsilon=run.epsilon,
            seed=run.seed,
            deltas=changes,
            extraction=run.extraction,
            progress=recorder.launching,
            state_shardings=places.state,
        )

    def on_launch(report) -> None:
        report = report.on_host(report)
        if jax.process_index() == 0:
            write_rankings(run.workdir / "directions.npz", report)

    def evaluate(state: TrainState) -> Figures:
        return run.evaluate(bind_variables(params, state.trainable, state.directions))

    return loop.LoopCallbacks(
        step=step,
        launch=launch,
        batch=run.batch,
        evaluate=evaluate,
        on_launch=on_launch,
        rates=run.rates,
        settle=settle,
    )


def evaluated(
    recorder: Recorder, parts: loop.LoopCallbacks, state: TrainState, at: int
) -> Figures | None:
    """Return the figures at a step: those on record, or fresh ones of this state."""
    figures = recorder.find("eval", at)
    known = processes.broadcast_flag(figures is not None)  # the others keep no record
    if not known and int(state.step) == at:
        figures = parts.evaluate(state)
        recorder.evaluation(at, figures)
    return figures


def finish(
    run: Run,
    state: TrainState,
    params: Mapping[str, Any],
    recorder: Recorder,
    watch: loop.Stopwatch,
    before: Figures | None,
    after: Figures | None,
) -> None:
    """Write adapter, summary and plots, and say where they are."""
    state = report.on_host(state)
    rest = neighbours(run.spec.full, paths.flatten(params))
    rest = report.on_host(rest)
    if jax.process_index() != 0:
        return
    save_adapter(
        run.workdir / ADAPTER,
        state.trainable,
        state.directions,
        run.spec,
        launched=bool(state.launched),
        indices=report.launched_indices(run.workdir, run.spec, state),
        base_model=run.base.name,
    )
    export = to_peft(
        run.workdir / "adapter",
        state.trainable,
        state.directions,
        functools.partial(
            huggingface.module_name, model_type=run.base.network.config.model_type
        ),
        base_model=run.base.name,
        params=paths.update(run.base.params, rest),
        task_type=run.base.family.kind.peft_task,
    )
    if run.base.added is not None:
        run.base.tokenizer.save_pretrained(str(run.workdir / "adapter"))
    old = read_json_or_empty(run.workdir / "summary.json")
    launches = [row for row in recorder.rows if row["kind"] == "launch"]
    launch = launches[0] if launches else {"step": run.plan.launch_step}
    timed = bool(watch.tokens)  # a finished run that is started again times nothing
    summary = {
        "method": run.spec.method.name,
        "keep": run.spec.method.keep,
        "launch_step": launch["step"],
        "steps": run.plan.steps,
        "trainable_params": run.spec.trainable,
        "adapter_rank": export.rank,
        "directions": report.gains_used(state),
        "before": before,
        "after": after,
        "train_tokens_per_second": watch.tokens_per_second,
        "compile_seconds": watch.compile_seconds,
        "extract_seconds": launch.get("extract_seconds"),
        "peak_memory_bytes": report.peak_memory_bytes(),
    }
    write_json(
        run.workdir / "summary.json",
        summary if timed else summary | old,
        sort_keys=True,
    )
    report.write_plots(run.workdir, recorder.rows, state)
    high = export.rank > 16 and not export.dora
    cap = " (vLLM serves it with --max-lora-rank)" if high else ""
    kind = "DoRA adapter" if export.dora else "adapter"
    recorder.say(f"{kind} of rank {export.rank}{cap} in {run.workdir / 'adapter'}")
    recorder.say(f"summary.json and plots/ in {run.workdir}")
