"""What a run leaves behind: adapter, summary, plots."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tsd_jax import huggingface
from tsd_jax.analysis import arrays, maps, plots
from tsd_jax.app.evaluation import Figures
from tsd_jax.app.model import Base
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import Spec
from tsd_jax.evaluation.scoring import fetch
from tsd_jax.huggingface.full_tensors import neighbours
from tsd_jax.huggingface.peft.write import PeftExport, to_peft
from tsd_jax.storage.adapter_file import save_adapter
from tsd_jax.storage.atomic import read_json_or_empty, write_json
from tsd_jax.storage.directions_file import LaunchRecord, read_directions
from tsd_jax.storage.run_files import (
    ADAPTER,
    DIRECTIONS,
    PEFT_FOLDER,
    PLOTS,
    SUMMARY,
)
from tsd_jax.training.loop import LoopConfig, Stopwatch
from tsd_jax.training.recorder import Recorder
from tsd_jax.training.state import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_VLLM_RANK = 16  # the highest that vLLM serves without --max-lora-rank


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      state: after the last step.
      before: figures of the untrained adapters.
      after: figures of the trained ones.
      watch: over the steps taken.
    """

    state: TrainState
    before: Figures | None
    after: Figures | None
    watch: Stopwatch


def write(
    workdir: Path,
    base: Base,
    spec: Spec,
    plan: LoopConfig,
    params: Mapping[str, Any],
    outcome: Outcome,
    recorder: Recorder,
) -> None:
    """Write adapter, summary and plots, and say where they are.

    Args:
      workdir: of the run.
      base: the model.
      spec: what is adapted.
      plan: when things happened.
      params: the base's tree.
      outcome: how the run ended.
      recorder: where its figures were recorded.
    """
    state = on_host(outcome.state)
    rest = neighbours(spec.full, paths.flatten(params))
    rest = on_host(rest)
    if jax.process_index() != 0:
        return
    found = launched_directions(workdir, state, recorder)
    save_adapter(
        workdir / ADAPTER,
        state.trainable,
        state.directions,
        spec,
        launched=bool(state.launched),
        indices=None if found is None else launched_indices(found, spec),
        base_model=base.name,
        base=base.facts,
        base_revision=base.revision,
    )
    export = write_peft(workdir / PEFT_FOLDER, base, state, rest)
    launches = [row for row in recorder.rows if row["kind"] == "launch"]
    launch = launches[0] if launches else {"step": plan.launch_step}
    new = summary(spec, plan, outcome, launch) | {
        "adapter_rank": export.rank,
        "directions": gains_used(state),
    }
    # A finished run that is started again has nothing to time: the old times stand.
    old = {} if outcome.watch.tokens else read_json_or_empty(workdir / SUMMARY)
    write_json(workdir / SUMMARY, new | old, sort_keys=True)
    write_plots(workdir, recorder.rows, state, found)
    recorder.say(f"{_told(export)} in {workdir / 'adapter'}")
    recorder.say(f"{SUMMARY} and {PLOTS}/ in {workdir}")


def write_peft(
    folder: Path, base: Base, state: TrainState, rest: Mapping[str, Any]
) -> PeftExport:
    """Write the trained adapter in PEFT's format, with the tokens it added.

    Args:
      folder: to write to.
      base: the model.
      state: at the end, on the host.
      rest: {path: parameter that PEFT saves with one that trained in full}.
    """
    export = to_peft(
        folder,
        state.trainable,
        state.directions,
        base.module_name,
        base_model=base.name,
        revision=base.revision,
        params=paths.update(base.params, rest),
        task_type=base.family.kind.peft_task,
    )
    if base.added is not None:
        huggingface.save_tokenizer(base.tokenizer, base.folder, folder)
    return export


def _told(export: PeftExport) -> str:
    """Describe an adapter, and what serving it takes."""
    if export.dora:
        return f"DoRA adapter of rank {export.rank}"
    flag = " (vLLM serves it with --max-lora-rank)"
    return f"adapter of rank {export.rank}{flag if export.rank > _VLLM_RANK else ''}"


def summary(
    spec: Spec, plan: LoopConfig, outcome: Outcome, launch: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of a finished run.

    Args:
      spec: what is adapted.
      plan: when things happened.
      outcome: how the run ended.
      launch: the recorded row of the launch, or its planned step.
    """
    return {
        "method": spec.method.name,
        "keep": spec.method.keep,
        "launch_step": launch["step"],
        "steps": plan.steps,
        "trainable_params": spec.trainable,
        "before": outcome.before,
        "after": outcome.after,
        "train_tokens_per_second": outcome.watch.tokens_per_second,
        "compile_seconds": outcome.watch.compile_seconds,
        "extract_seconds": launch.get("extract_seconds"),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def environment() -> dict[str, Any]:
    """Return the versions and devices a run used."""
    devices = jax.devices()
    return {
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def peak_memory_bytes() -> int:
    """Return the most memory one device has held; of the process, on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(s["peak_bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def on_host(tree: Any) -> Any:
    """Return a tree of small arrays on the host, whole in every process."""
    return jax.tree.map(fetch, tree)


def gains_used(state: TrainState) -> dict[str, list[int]]:
    """Return how many directions train in every matrix, by kernel path.

    Args:
      state: on the host; methods without gains give an empty dict.
    """
    used = {}
    for path, adapter in state.trainable.adapters.items():
        gate = state.directions[path].gate
        if adapter.gain is not None:
            shape = adapter.gain.shape[:-1]
            size = adapter.gain.shape[-1]
            counts = np.full(shape, size) if gate is None else np.sum(gate, -1)
            used[path] = [int(count) for count in np.reshape(counts, -1)]
    return used


def launched_directions(
    workdir: Path, state: TrainState, recorder: Recorder
) -> dict[str, LaunchRecord] | None:
    """Return {kernel path: what launch found}, as directions.npz has it.

    None before launch, where the run started from directions launched elsewhere, and
    where the file is lost or damaged, which is told.

    Args:
      workdir: of the run.
      state: at the end.
      recorder: tells it.
    """
    launched = any(row["kind"] == "launch" for row in recorder.rows)
    if not state.launched or not (launched or (workdir / DIRECTIONS).is_file()):
        return None
    try:
        return read_directions(workdir / DIRECTIONS)
    except InputError as error:
        recorder.say(f"exported without indices of directions: {error}")
        return None


def launched_indices(
    found: Mapping[str, LaunchRecord], spec: Spec
) -> dict[str, np.ndarray]:
    """Return {kernel path: launched directions, (*batch, c)}."""
    return {
        kernel.path: found[kernel.path].indices.reshape(*kernel.batch_shape, -1)
        for kernel in spec.kernels
    }


def write_plots(
    workdir: Path,
    rows: Sequence[Mapping[str, Any]],
    state: TrainState,
    spectra: Mapping[str, LaunchRecord] | None,
) -> None:
    """Draw the loss, and for a method with launch its spectra and overlaps.

    Args:
      workdir: of the run.
      rows: of metrics.jsonl.
      state: at the end, on the host.
      spectra: what launch found, or None.
    """
    folder = workdir / PLOTS
    folder.mkdir(exist_ok=True)
    launched = [row["step"] for row in rows if row["kind"] == "launch"]
    plots.plot_loss(rows, launched[0] if launched else None, folder / "loss.png")
    if launched and spectra is not None:
        plots.plot_spectra(spectra, folder / "spectra.png")
        if any(spectrum.used is not None for spectrum in spectra.values()):
            maps.plot_gains(spectra, folder / "gains.png")
        overlaps = arrays.learned_overlap(state.trainable, state.directions)
        maps.plot_overlap(overlaps, folder / "overlap.png")
