"""Time direction extraction against the authors' procedure, side by side.

    python bench/extraction.py                     the five kernels of a LLaMA-7B layer
    python bench/extraction.py --scale 8           the same at an eighth of the width

Ours is `tsd_jax.launch` as users call it, without a cache, then with an empty one and
with a full one. Theirs is what the authors' code does at its launch: one float32
`torch.linalg.svd` per kernel, U^T dW V formed densely, the top 8 of its diagonal over
sigma. Each side runs in a process of its own over the same files; memory is the
process's peak above inputs and imports, ours with compilation. The sets are compared
with a float64 SVD. Needs torch (`make bench` installs it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WIDTH, INNER = 4096, 11008
KERNELS = ("q", "k", "v", "up", "down")
SPECTRA = ("geometric", "gaussian", "heavy")
RANK, TOP, SCALE, EPSILON = 8, 8, 2.0, 1e-6


def shape_of(name: str, scale: int) -> tuple[int, int]:
    """Return (in, out) of a kernel of the layer, its widths divided by `scale`."""
    width, inner = WIDTH // scale, INNER // scale
    return {"up": (width, inner), "down": (inner, width)}.get(name, (width, width))


def make_kernel(spectrum: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Make a kernel of a given spectrum: geometric 10 to 0.01, or heavy-tailed.

    The singular vectors are random signs and cosine transforms, which are orthogonal
    and quick; "gaussian" is a matrix of normal numbers.
    """
    from scipy.fft import dct

    rng = np.random.default_rng(seed)
    if spectrum == "gaussian":
        return rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
    short = min(shape)
    if spectrum == "geometric":
        sigma = np.geomspace(10, 0.01, short)
    else:
        sigma = np.sort(0.05 / rng.random(short))[::-1]  # Pareto: P(sigma > x) ~ 1/x
        sigma = np.minimum(sigma, 100.0)
    matrix = np.zeros(shape)
    matrix[np.arange(short), np.arange(short)] = sigma
    for axis in (0, 1):
        for _ in range(2):
            signs = rng.choice([-1.0, 1.0], shape[axis])
            matrix *= np.expand_dims(signs, 1 - axis)
            matrix = np.asarray(dct(matrix, axis=axis, norm="ortho"))
    return matrix.astype(np.float32)


def make_inputs(folder: Path, spectrum: str, names: list[str], scale: int) -> None:
    """Write every kernel with trained-looking A and B."""
    for n, name in enumerate(names):
        shape = shape_of(name, scale)
        rng = np.random.default_rng(100 + n)
        np.savez(
            folder / f"{name}.npz",
            kernel=make_kernel(spectrum, shape, n),
            a=rng.normal(0, 0.02, (shape[0], RANK)).astype(np.float32),
            b=rng.normal(0, 0.02, (RANK, shape[1])).astype(np.float32),
        )


def read_inputs(folder: Path, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Read what `make_inputs` wrote."""
    return {name: dict(np.load(folder / f"{name}.npz")) for name in names}


def memory(field: str) -> int:
    """Read VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measured(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Time `run`; the first call, which may compile, apart from the others."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
    seconds = []
    result = None
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begun)
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "peak_bytes": memory("VmHWM") - before,
        "sets": result,
    }


def ours(folder: Path, names: list[str], device: str, how: str) -> Callable[[], Any]:
    """Return our extraction as a function of no arguments: {name: top indices}."""
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax

    import tsd_jax as tsd
    from tsd_jax.core.layout import Layout
    from tsd_jax.core.spec import build_spec

    inputs = read_inputs(folder, names)
    params = {name: jax.device_put(x["kernel"]) for name, x in inputs.items()}
    rule = tsd.Rule(pattern=".*", rank=RANK, alpha=SCALE * RANK, directions=TOP)
    spec = build_spec(
        {name: kernel.shape for name, kernel in params.items()},
        dict.fromkeys(params, Layout()),
        dict.fromkeys(params, rule),
        tsd.get_method("dash"),
    )
    trainable, _ = tsd.init(jax.random.key(0), spec)
    adapters = {
        name: adapter.replace(a=jax.device_put(x["a"]), b=jax.device_put(x["b"]))
        for (name, adapter), x in zip(
            trainable.adapters.items(), inputs.values(), strict=True
        )
    }
    trainable = tsd.Trainable(adapters=adapters)
    del inputs
    jax.block_until_ready((params, trainable))
    store = tsd.SpectraFolder(folder / "spectra") if how == "cached" else None
    extraction = tsd.Extraction(store=store)

    def run() -> dict[str, list[int]]:
        *_, report = tsd.launch(
            params, trainable, spec, epsilon=EPSILON, extraction=extraction
        )
        return {name: np.asarray(r.indices).tolist() for name, r in report.items()}

    return run


def theirs(folder: Path, names: list[str], device: str) -> Callable[[], Any]:
    """Return the authors' procedure as a function of no arguments."""
    import torch  # pyright: ignore[reportMissingImports]

    where = "cuda" if device == "gpu" else "cpu"
    inputs = {
        name: {key: torch.from_numpy(x).to(where) for key, x in arrays.items()}
        for name, arrays in read_inputs(folder, names).items()
    }

    def run() -> dict[str, list[int]]:
        sets = {}
        for name, x in inputs.items():
            change = SCALE * (x["a"] @ x["b"])
            left, sigma, right = torch.linalg.svd(x["kernel"], full_matrices=False)
            moved = torch.diag(left.T @ change @ right.T)
            rates = moved.abs() / (sigma + EPSILON)
            sets[name] = torch.topk(rates, TOP).indices.tolist()
        return sets

    return run


def reference(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Return the top sets of a float64 SVD, a wide kernel's by way of its LQ."""
    sets = {}
    for name, x in read_inputs(folder, names).items():
        kernel, a, b = (x[key].astype(np.float64) for key in ("kernel", "a", "b"))
        if kernel.shape[0] > kernel.shape[1]:
            kernel, a, b = kernel.T, b.T, a.T
        q, r = np.linalg.qr(kernel.T)  # kernel = r.T q.T
        left, sigma, right = np.linalg.svd(r.T)
        moved = np.sum((left.T @ a) * (b @ (q @ right.T)).T, 1) * SCALE
        rates = np.abs(moved) / (sigma + EPSILON)
        sets[name] = np.argsort(-rates)[:TOP].tolist()
    return sets


def child(args: argparse.Namespace) -> None:
    """Run one side in this process and print its figures as JSON."""
    folder = Path(args.folder)
    if args.side == "reference":
        print(json.dumps(reference(folder, args.kernels)))
        return
    if args.side == "theirs":
        run = theirs(folder, args.kernels, args.device)
    else:
        run = ours(folder, args.kernels, args.device, args.side)
    print(json.dumps(measured(run, args.repeats)))


def spawn(args: argparse.Namespace, folder: Path, side: str) -> Any:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--kernels", *args.kernels, "--repeats", str(args.repeats)]
    command += ["--device", args.device]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def agreement(sets: dict[str, list[int]], want: dict[str, list[int]] | None) -> str:
    """Count kernels whose top set is the float64 one."""
    if want is None:
        return "-"
    right = sum(set(sets[name]) == set(indices) for name, indices in want.items())
    return f"{right}/{len(want)}"


def compare(args: argparse.Namespace, spectrum: str) -> list[dict[str, Any]]:
    """Measure every side on one spectrum."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, spectrum, args.kernels, args.scale)
        want = None if args.no_reference else spawn(args, folder, "reference")
        rows = []
        for side in ("theirs", "ours", "cached"):
            figures = spawn(args, folder, side)
            seconds = statistics.median(figures["seconds"])
            row = {
                "spectrum": spectrum,
                "side": side,
                "seconds": seconds,
                "first_seconds": figures["first_seconds"],
                "peak_bytes": figures["peak_bytes"],
                "right_sets": agreement(figures["sets"], want),
            }
            rows.append(row)
            base = rows[0]
            row["times_faster"] = base["seconds"] / seconds
            row["memory_ratio"] = row["peak_bytes"] / base["peak_bytes"]
            print(
                f"{spectrum:<10} {side:<7} {seconds:8.2f} s"
                f" {row['times_faster']:6.2f} x"
                f"  first {row['first_seconds']:7.2f} s"
                f"  peak {row['peak_bytes'] / 2**20:7.0f} MiB"
                f"  {row['memory_ratio']:5.2f} of theirs  sets {row['right_sets']}",
                flush=True,
            )
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA), choices=SPECTRA)
    parser.add_argument("--repeats", type=int, default=1, help="after the first call")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide the widths by this"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--no-reference", action="store_true", help="skip float64 sets")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    rows = [row for spectrum in args.spectra for row in compare(args, spectrum)]
    result = {
        "benchmark": "extraction",
        "device": args.device,
        "kernels": {name: shape_of(name, args.scale) for name in args.kernels},
        "repeats": args.repeats,
        "rows": rows,
    }
    some = [] if args.kernels == list(KERNELS) else args.kernels
    name = "_".join(["extraction", *some, *[args.device] * (args.device != "cpu")])
    file = ROOT / "bench" / "results" / f"{name}.json"
    if args.scale == 1:
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
