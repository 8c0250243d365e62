"""What a run leaves behind: adapter, summary, plots."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsd_jax.analysis import arrays, maps, plots
from tsd_jax.core.spec import Spec
from tsd_jax.storage.directions_file import read_directions
from tsd_jax.training.state import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


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
    """Bring small arrays to the host, the parts of other processes included."""

    def fetch(leaf):
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

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


def launched_indices(
    workdir: Path, spec: Spec, state: TrainState
) -> dict[str, np.ndarray] | None:
    """Return {kernel: launched directions, (*batch, c)}; None before launch."""
    if not state.launched:
        return None
    found = read_directions(workdir / "directions.npz")
    return {
        kernel.path: found[kernel.path].indices.reshape(*kernel.batch_shape, -1)
        for kernel in spec.kernels
    }


def write_plots(
    workdir: Path, rows: Sequence[Mapping[str, Any]], state: TrainState
) -> None:
    """Draw the loss, and for a method with launch its spectra and overlaps.

    Args:
      workdir: holds directions.npz after a launch.
      rows: of metrics.jsonl.
      state: at the end, on the host.
    """
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    launched = [row["step"] for row in rows if row["kind"] == "launch"]
    plots.plot_loss(rows, launched[0] if launched else None, folder / "loss.png")
    if launched:
        spectra = read_directions(workdir / "directions.npz")
        plots.plot_spectra(spectra, folder / "spectra.png")
        if any(spectrum.used is not None for spectrum in spectra.values()):
            maps.plot_gains(spectra, folder / "gains.png")
        overlaps = arrays.learned_overlap(state.trainable, state.directions)
        maps.plot_overlap(overlaps, folder / "overlap.png")
