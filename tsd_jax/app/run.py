"""One run: prepare it, load the weights, train, evaluate, and write what it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from tsd_jax.app import callbacks, report
from tsd_jax.app.build import Prepared, prepare
from tsd_jax.app.caches import use_program_cache
from tsd_jax.app.callbacks import Shardings
from tsd_jax.app.config import RENAMED, flatten
from tsd_jax.app.eos import untrained_eos
from tsd_jax.app.evaluation import Figures
from tsd_jax.app.first_check import check_first
from tsd_jax.app.model import load_weights
from tsd_jax.app.plan import describe
from tsd_jax.app.settings import Settings
from tsd_jax.app.start import RECORD, started
from tsd_jax.core.errors import InputError
from tsd_jax.storage import locks, run_files
from tsd_jax.storage.atomic import read_json_or_empty, write_json
from tsd_jax.storage.run_files import CHECKPOINTS, CONFIG
from tsd_jax.training import loop, processes, sharding
from tsd_jax.training.checkpoint import Checkpoints
from tsd_jax.training.recorder import LoadingBar, Recorder
from tsd_jax.training.state import TrainState, create_state

# Keys that may change when a run resumes, without changing its result.
_FREE = (
    "cache_dir",
    "cache_spectra",
    "cache_spectra_gb",
    "check",
    "mesh",
    "eval.every",
    "train.checkpoint_every",
    "train.log_every",
)


def run(settings: Settings, workdir: Path, *, dry_run: bool = False) -> int:
    """Carry a run out, or say what it would train; return the exit code.

    Args:
      settings: of the run.
      workdir: its folder.
      dry_run: whether to stop after the plan is printed.

    Raises:
      InputError: the settings do not suit the devices, the model or the data, or the
        workdir belongs to another run or cannot be written to.
    """
    use_program_cache(settings.cache_dir)
    if dry_run:
        tell(prepare(settings, workdir))
        return 0
    claim(workdir, flatten(settings))  # refuses now, before anything is read
    with held(workdir):
        prepared = prepare(settings, workdir)
        tell(prepared)
        try:
            execute(settings, prepared, workdir)
        except loop.StopRequested as error:
            program = os.path.basename(sys.argv[0])
            print(
                f"{program}: {error}; the same command resumes from there",
                file=sys.stderr,
            )
            return 130
    return 0


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Hold a workdir in the first process; say so where it cannot be locked."""
    if jax.process_index() != 0:
        yield
        return
    with locks.held(workdir) as locked:
        if not locked:
            print(
                f"workdir {workdir} has no locks: a second run there goes unnoticed",
                flush=True,
            )
        yield


def tell(prepared: Prepared) -> None:
    """Print what a run is about to train, in the first process."""
    if jax.process_index() == 0:
        plan, params = prepared.plan, prepared.base.params
        print(
            describe(
                prepared.spec, params, plan.launch_step, plan.steps, plan.auto_launch
            )
        )
        print("\n".join(prepared.notes), flush=True)


def execute(settings: Settings, prepared: Prepared, workdir: Path) -> None:
    """Load the weights, train, evaluate, and write what the run leaves behind.

    Args:
      settings: of the run.
      prepared: its pieces, made of the settings.
      workdir: its folder.

    Raises:
      InputError: the workdir belongs to another run, the data or the model are no
        longer what it read, or the weights are not those of the model's config; nothing
        on disk has changed then.
      StopRequested: SIGINT or SIGTERM came; the state is saved.
    """
    base, plan, mesh = prepared.base, prepared.plan, prepared.mesh
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    recorded = flatten(settings)
    resumes = claim(workdir, recorded)
    if resumes:
        run_files.check_digests(workdir, recorded, prepared.digests)
    is_first = jax.process_index() == 0
    shardings = sharding.param_shardings(base.params, base.family.kind.rules, mesh)
    with LoadingBar(active=is_first) as bar:
        head_key = jax.random.fold_in(init_key, 1)
        params = load_weights(base, mesh, shardings, head_key, bar)
    told = first_words(settings, prepared, params, resumes)
    if is_first:
        for line in told:
            warns = line.startswith("warning: ")
            print(line, file=sys.stderr if warns else sys.stdout, flush=True)
        write_config(workdir, recorded, prepared)
    _check_shared(workdir)
    with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
        saved = checkpoints if resumes else None
        state, places = start(prepared, init_key, params, shardings, saved)
        with Recorder(
            workdir,
            steps=plan.steps,
            start=int(state.step),
            launched=bool(state.launched),
            active=is_first,
        ) as recorder:
            calls = loop_callbacks(
                settings, prepared, params, places, recorder, workdir
            )
            before = evaluated(recorder, calls, state, at=0)
            state, watch = loop.run(
                state, params, dropout_key, calls, plan, recorder, checkpoints
            )
            after = evaluated(recorder, calls, state, at=plan.steps)
            outcome = report.Outcome(state, before, after, watch)
            report.write(workdir, base, prepared.spec, plan, params, outcome, recorder)


def first_words(
    settings: Settings, prepared: Prepared, params: Any, resumes: bool
) -> list[str]:
    """Check the loaded model; return the lines on what was found.

    Args:
      settings: of the run.
      prepared: its pieces.
      params: the base's, loaded.
      resumes: whether the run goes on from a checkpoint.

    Raises:
      InputError: the model with adapters is not its merged form.
    """
    base, spec, lines = prepared.base, prepared.spec, []
    if settings.check and not resumes:
        batch = prepared.batch(0)
        lines.append(check_first(base, params, spec, batch, settings.cache_dir))
    warning = untrained_eos(params, spec, base.tokenizer, prepared.eos)
    return [*lines, f"warning: {warning}"] if warning else lines


def claim(workdir: Path, recorded: Mapping[str, Any]) -> bool:
    """Return whether a run of the same settings lies in a workdir, to resume.

    Args:
      workdir: may not exist yet; it is not changed.
      recorded: the settings as config.json records them.

    Raises:
      InputError: the workdir cannot take this run.
    """
    old = read_json_or_empty(workdir / CONFIG).get("config")
    for key in old if isinstance(old, dict) else ():
        if key in RENAMED:
            raise InputError(
                f"workdir {workdir} belongs to a run of an older tsd_jax: its config "
                f"has {key}, which is now {RENAMED[key]}; use a new --workdir"
            )
    resumes = run_files.claim_workdir(workdir, recorded, _FREE)
    return processes.broadcast_flag(resumes)


def write_config(
    workdir: Path, recorded: Mapping[str, Any], prepared: Prepared
) -> None:
    """Make the workdir, and record what the run is of and where it starts."""
    workdir.mkdir(parents=True, exist_ok=True)
    content = {
        "config": dict(recorded),
        "digests": dict(prepared.digests),
        **report.environment(),
    }
    if prepared.base.labels is not None:
        content["labels"] = dataclasses.asdict(prepared.base.labels)
    if prepared.start is not None:
        content[RECORD] = prepared.start.record
    write_json(workdir / CONFIG, content, sort_keys=True)


def _check_shared(workdir: Path) -> None:
    """Raise InputError unless all processes see the first one's workdir."""
    processes.wait_for_all(CONFIG)
    if not (workdir / CONFIG).exists():
        raise InputError(
            f"workdir {workdir} is not the first process's folder here: give one that "
            "all processes share"
        )


def start(
    prepared: Prepared,
    key: jax.Array,
    params: Mapping[str, Any],
    shardings: Any,
    checkpoints: Checkpoints | None,
) -> tuple[TrainState, Shardings]:
    """Create the state where it shall lie, or restore the newest one.

    Args:
      prepared: the pieces of the run.
      key: for the adapters.
      params: the base's tree.
      shardings: of that tree.
      checkpoints: where the newest may be; None for a new run.
    """
    spec, optimizer = prepared.spec, prepared.optimizer
    auto_launch = prepared.plan.auto_launch

    def create(key: jax.Array, params: Any) -> TrainState:
        return create_state(key, spec, optimizer, auto_launch, params=params)

    abstract = jax.eval_shape(create, key, params)
    places = sharding.state_shardings(abstract, spec, shardings, prepared.mesh)
    if checkpoints is None or checkpoints.latest is None:
        state = jax.jit(create, out_shardings=places)(key, params)
        if prepared.start is not None:
            whole = state.replace(trainable=report.on_host(state.trainable))
            whole = started(prepared.start, whole, spec, prepared.base, params)
            state = jax.device_put(whole, places)
        return state, Shardings(shardings, places)
    template = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        abstract,
        places,
    )
    return checkpoints.restore(template), Shardings(shardings, places)


def loop_callbacks(
    settings: Settings,
    prepared: Prepared,
    params: Mapping[str, Any],
    shardings: Shardings,
    recorder: Recorder,
    workdir: Path,
) -> loop.LoopCallbacks:
    """Return what the loop calls."""
    spec, loss_fn, method = prepared.spec, prepared.loss_fn, settings.method
    settle = callbacks.SettleCheck(
        params, spec, prepared.plan.auto_launch, method.epsilon
    )
    launch = callbacks.Launch(
        params=params,
        spec=spec,
        epsilon=method.epsilon,
        seed=settings.seed,
        extraction=prepared.extraction,
        gradient_batches=method.gradient_batches,
        loss_fn=loss_fn,
        batch=prepared.batch,
        progress=recorder.launching,
        shardings=shardings.state,
        release=settle.release,
    )
    return loop.LoopCallbacks(
        step=callbacks.train_step(
            loss_fn, prepared.optimizer, spec, shardings, prepared.mesh
        ),
        launch=launch,
        batch=prepared.batch,
        evaluate=callbacks.state_evaluation(prepared.evaluate, params),
        on_launch=callbacks.rankings_writer(workdir),
        rates=prepared.rates,
        settle=settle,
    )


def evaluated(
    recorder: Recorder, calls: loop.LoopCallbacks, state: TrainState, at: int
) -> Figures | None:
    """Return the figures at a step: those on record, or fresh ones of this state.

    Returns:
      The figures; None where there are none, or the state is of another step.
    """
    figures = recorder.find("eval", at)
    known = processes.broadcast_flag(figures is not None)  # the others keep no record
    if not known and int(state.step) == at:
        figures = calls.evaluate(state)
        if figures:
            recorder.evaluation(at, figures)
    return figures or None
