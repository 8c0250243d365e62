"""One of two processes that launch together: python -m tests.helpers.two_processes.

Prints the launched arrays' sums as JSON; every process must print the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

DEVICES = 2  # of each process
SHAPE = (5, 16, 24)


def problem():
    """Give a spec, a stack of kernels, and trained adapters."""
    import numpy as np

    from tests.helpers.trees import STACKED, small_spec, trained

    spec = small_spec("tsd", shape=SHAPE, layout=STACKED, rank=3, directions=4)
    kernel = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    return spec, kernel, trained(0, spec)[0]


def launched(where: str, store: str | None, axes: tuple) -> list[list[float]]:
    """Launch on a mesh over both processes; give indices, sigma and dK's sums."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    import tsd_jax as tsd
    from tsd_jax.core.adapter import delta
    from tsd_jax.training.sharding import make_mesh

    spec, kernel, adapters = problem()
    place = NamedSharding(make_mesh((1, 2, 2)), PartitionSpec(*axes))
    whole = jax.make_array_from_callback(SHAPE, place, lambda index: kernel[index])
    extraction = tsd.Extraction(
        where=where, memory_budget=1, store=tsd.SpectraFolder(store) if store else None
    )
    new, frozen, report = tsd.launch(
        {"k": whole}, adapters, spec, extraction=extraction
    )
    change = jax.jit(delta)(new["k"], frozen["k"])
    found = (report["k"].indices, report["k"].sigma, new["k"].a, change)
    gathered = [
        np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for leaf in found
    ]
    return [np.abs(leaf).sum(axis=0).reshape(-1).tolist() for leaf in gathered]


def main(port: str, number: str, folder: str) -> None:
    """Join the other process, launch in every way, and print what came of it."""
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    store = str(Path(folder) / number)  # each host has a disk of its own
    results = {
        "devices": launched("devices", None, (None, "fsdp", "tensor")),
        "layers": launched("devices", None, (None, None, "fsdp")),
        "hosts": launched("hosts", None, (None, "fsdp", "tensor")),
        "store": launched("devices", store, (None, "fsdp", "tensor")),
    }
    kept = len(list(Path(store).iterdir()))
    again = launched("devices", store, (None, "fsdp", "tensor"))
    print(json.dumps({"results": results, "kept": kept, "again": again}), flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    main(*sys.argv[1:])
