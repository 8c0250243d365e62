"""Measure the time and memory of loading a checkpoint of random weights.

    python bench/loading.py                  8.7 GB of weights, and 1.3 GB for ratios
    python bench/loading.py --layers 2       a small run

The checkpoints are created and deleted here. Ours is `load_params` as users call it,
bfloat16 to the CPU's device. The large checkpoint has several files of bfloat16 and one
of float32. The one for ratios has one file or several, all bfloat16, and is read by one
thread or several, with the layers stacked or separate. "plain" is the usual way: all
tensors of `safetensors.numpy.load_file`, transposed, stacked, and put on the device.

Every row is a process of its own that loads three times: with the files not in the page
cache (cold), again (warm), and once more while memory is sampled every 5 ms. Memory is
the peak of anonymous memory above that at the start, minus the arrays placed so far.
Mapped pages of files do not count: the system reclaims them when it needs memory. The
large checkpoint is loaded only once, cold and sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
READERS = 4
# {name: (checkpoint, threads or None for the plain way, layers stacked)}.
ROWS: dict[str, tuple[str, int | None, bool]] = {
    "plain": ("single", None, True),
    "single file, 1 thread": ("single", 1, True),
    "single file, 4 threads": ("single", READERS, True),
    "several files, 1 thread": ("several", 1, True),
    "several files, 4 threads": ("several", READERS, True),
    "several files, 4 threads, layers apart": ("several", READERS, False),
    "large, 4 threads": ("large", READERS, True),
}


def config_of(layers: int) -> Any:
    """Return a config with the widths of LLaMA-7B."""
    from tsd_jax.models.config import DecoderConfig

    return DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )


def make_checkpoint(folder: Path, layers: int, files: int, wide: bool) -> int:
    """Write random weights, and return their bytes.

    Args:
      folder: to create.
      layers: of the model.
      files: number of files; several get an index.
      wide: make the last file float32.
    """
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from tsd_jax.huggingface import abstract_params, names

    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2**22, np.float32) * 0.02
    flat = names.flatten(abstract_params(config_of(layers)))
    shapes = list(names.tensor_shapes(flat, "llama").items())
    weight_map, size = {}, 0
    folder.mkdir()
    for number in range(files):
        own = shapes[number::files]
        dtype = np.float32 if wide and number == files - 1 else jnp.bfloat16
        values = noise.astype(dtype)
        tensors = {
            name: np.resize(np.roll(values, int(rng.integers(2**22))), shape)
            for name, shape in own
        }
        file = f"model-{number}.safetensors" if files > 1 else "model.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if files > 1:
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    return size


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def anonymous() -> int:
    """Return the anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Sampler(threading.Thread):
    """A thread that samples the peak of anonymous memory minus placed arrays."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes, self.peak, self.done = anonymous(), 0, threading.Event()

    def run(self) -> None:
        """Sample until `stop` is called."""
        import jax

        placed = 0
        while not self.done.wait(0.005):
            # A first axis of one is a single matrix in transit: it does not count. A
            # donated array is briefly not listed, so the sum must not fall.
            arrays = [x for x in jax.live_arrays() if x.shape[:1] != (1,)]
            placed = max(placed, sum(x.nbytes for x in arrays))
            self.peak = max(self.peak, anonymous() - self.start_bytes - placed)

    def stop(self) -> int:
        """Stop and return the peak, in bytes."""
        self.done.set()
        self.join()
        return self.peak


def plain(folder: Path, config: Any) -> Any:
    """Load the usual way: everything to the host, then to the device."""
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from tsd_jax.huggingface import abstract_params, names

    tensors = load_file(folder / "model.safetensors")
    params = {}
    for path, leaf in names.flatten(abstract_params(config)).items():
        layers = [
            tensors[name] for name in names.tensor_names(path, leaf.shape, "llama")
        ]
        layers = [each.T if names.is_transposed(path) else each for each in layers]
        stack = np.stack(layers) if names.stacked_axes(path) else layers[0]
        params[path] = jnp.asarray(stack)
    return params


def child(args: argparse.Namespace) -> None:
    """Load in this process, cold and warm, and print the figures as JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    from tsd_jax.huggingface import load_params

    folder, config = Path(args.folder), config_of(args.layers)
    _, readers, stacked = ROWS[args.row]

    def load() -> Any:
        if readers is None:
            return plain(folder, config)
        return load_params(
            folder, config, dtype=jnp.bfloat16, scan_layers=stacked, readers=readers
        )

    jax.block_until_ready(jnp.zeros(3))
    figures: dict[str, Any] = {}
    forget(folder)
    large = args.row.startswith("large")
    for name in ("weighed",) if large else ("cold", "warm", "weighed"):
        sampler = Sampler()
        if name == "weighed":
            sampler.start()
        begun, used = time.perf_counter(), time.process_time()
        params = jax.block_until_ready(load())
        figures[f"{name}_seconds"] = time.perf_counter() - begun
        figures[f"{name}_cpu_seconds"] = time.process_time() - used
        figures["placed_bytes"] = sum(x.nbytes for x in jax.tree.leaves(params))
        if name == "weighed":
            figures["excess_bytes"] = sampler.stop()
        del params
    print(json.dumps(figures))


def spawn(row: str, folder: Path, layers: int) -> dict[str, Any]:
    """Run one row in a process of its own, and return its figures."""
    command = [sys.executable, __file__, "--row", row, "--folder", str(folder)]
    command += ["--layers", str(layers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, folder: Path, layers: int, size: int) -> dict[str, Any]:
    """Run one row, print it and return it."""
    figures = spawn(name, folder, layers)
    row: dict[str, Any] = {"row": name, "file_bytes": size, **figures}
    for kind in ("cold", "warm"):
        seconds = figures.get(f"{kind}_seconds", figures["weighed_seconds"])
        row[f"{kind}_gb_per_second"] = size / seconds / 1e9
    cold, warm = (row[f"{kind}_gb_per_second"] for kind in ("cold", "warm"))
    used = figures.get("warm_cpu_seconds", figures["weighed_cpu_seconds"])
    print(
        f"{name:<40} {size / 1e9:5.2f} GB  cold {cold:5.2f} GB/s"
        f"  warm {warm:5.2f} GB/s  {used:5.1f} CPU s"
        f"  above placed {figures['excess_bytes'] / 2**20:6.0f} MiB",
        flush=True,
    )
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return ratios of warm speeds between rows of this run."""
    speed = {row["row"]: row["warm_gb_per_second"] for row in rows}
    several, single = "several files, 4 threads", "single file, 4 threads"
    return {
        "ours_over_plain": speed[single] / speed["plain"],
        "several_over_single_file": speed[several] / speed[single],
        "4_threads_over_1": speed[several] / speed["several files, 1 thread"],
        "stacked_over_apart": speed[several] / speed[f"{several}, layers apart"],
    }


def run(layers: int) -> dict[str, Any]:
    """Make the checkpoints, run all rows, and return the results."""
    small = min(layers, 2)
    plans = {
        "large": (layers, 6, True),
        "single": (small, 1, False),
        "several": (small, 5, False),
    }
    rows = []
    for checkpoint, (number, files, wide) in plans.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / checkpoint
            size = make_checkpoint(folder, number, files, wide)
            rows += [
                measure(row, folder, number, size)
                for row, plan in ROWS.items()
                if plan[0] == checkpoint
            ]
    excess = rows[0]["excess_bytes"]
    bound = 2**30 + 2 * 32000 * 4096
    return {
        "benchmark": "loading",
        "ratios": ratios(rows),
        "excess_mib": excess / 2**20,
        "bound_mib": bound / 2**20,
        "bounded": excess < bound,
        "rows": rows,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20, help="of the large one")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        child(args)
        return
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    result = run(args.layers)
    if args.layers == 20:
        file = ROOT / "bench" / "results" / "loading.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
