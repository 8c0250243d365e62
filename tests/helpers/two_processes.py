"""One of two processes that launch together: python -m tests.helpers.two_processes.

Prints the sums of the launched arrays as JSON; every process must print the same. Also
loads a checkpoint over both, and prints how many of its elements this process read.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tsd_jax.models.config import DecoderConfig

DEVICES = 2  # of each process
SHAPE = (5, 16, 24)
MODEL = DecoderConfig(
    vocab_size=16,
    hidden_size=8,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=4,
)


def problem():
    """Return a spec, a stack of kernels, and trained adapters."""
    import numpy as np

    from tests.helpers.trees import STACKED, small_spec, trained

    spec = small_spec("tsd", shape=SHAPE, layout=STACKED, rank=3, directions=4)
    kernel = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    return spec, kernel, trained(0, spec)[0]


def launched(where: str, store: str | None, axes: tuple) -> list[list[float]]:
    """Launch on a mesh over both processes; return sums of indices, sigma, A and dK."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    import tsd_jax as tsd
    from tsd_jax.core.adapter import delta
    from tsd_jax.training.sharding import make_mesh

    spec, kernel, trainable = problem()
    place = NamedSharding(make_mesh((1, 2, 2)), PartitionSpec(*axes))
    whole = jax.make_array_from_callback(SHAPE, place, lambda index: kernel[index])
    extraction = tsd.Extraction(
        where=where, memory_budget=1, store=tsd.SpectraFolder(store) if store else None
    )
    new, frozen, report = tsd.launch(
        {"k": whole}, trainable, spec, extraction=extraction
    )
    change = jax.jit(delta)(new.adapters["k"], frozen["k"])
    found = (report["k"].indices, report["k"].sigma, new.adapters["k"].a, change)
    gathered = [
        np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for leaf in found
    ]
    return [np.abs(leaf).sum(axis=0).reshape(-1).tolist() for leaf in gathered]


def loaded(folder: str) -> int:
    """Load a checkpoint over both processes; return how many elements this one read."""
    import numpy as np
    from safetensors.numpy import load_file

    from tsd_jax.huggingface import abstract_params, device_loader, load_params
    from tsd_jax.huggingface.tensors import StoredTensor
    from tsd_jax.models.decoder import DECODER_RULES
    from tsd_jax.training.sharding import make_mesh, param_shardings

    elements = []
    plain = StoredTensor.read

    def read(self, index):
        part = plain(self, index)
        elements.append(part.size)
        return part

    StoredTensor.read, device_loader.AT_ONCE = read, 0
    mesh = make_mesh((1, 2, 2))
    shardings = param_shardings(abstract_params(MODEL), DECODER_RULES, mesh)
    params = load_params(folder, MODEL, shardings=shardings)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    tensors = load_file(Path(folder) / "model.safetensors")
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)]
    whole = np.stack([tensors[name].T for name in names])
    assert len(kernel.addressable_shards) == DEVICES
    for shard in kernel.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    return sum(elements)


def main(port: str, number: str, folder: str) -> None:
    """Join the other process, launch in every way, and print the results."""
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
    said = {"results": results, "kept": kept, "again": again}
    said["read"] = loaded(str(Path(folder) / "model"))
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    main(*sys.argv[1:])
