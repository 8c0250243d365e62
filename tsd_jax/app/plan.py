"""What a run is about to train, as a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tsd_jax.core import paths
from tsd_jax.core.full_params import FullSpec
from tsd_jax.core.quantization import Quantized
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.training.auto_launch import AutoLaunchConfig

_HEAD = ("kernel", "shape", "stack|in|out axes", "rank", "directions", "trainable")


def _axes(kernel: KernelSpec) -> str:
    roles = (kernel.layout.batch, kernel.layout.inputs, kernel.layout.outputs)
    return " | ".join(",".join(map(str, axes)) or "-" for axes in roles)


def _row(kernel: KernelSpec) -> tuple[str, ...]:
    gains = str(kernel.gains or "-")
    return (
        kernel.path,
        "x".join(map(str, kernel.shape)),
        _axes(kernel),
        str(kernel.rank),
        f"<= {gains}" if kernel.gated else gains,
        f"{kernel.trainable:,}",
    )


def _full_row(param: FullSpec) -> tuple[str, ...]:
    what = "full"
    if param.rows is not None:
        what = f"rows {param.rows[0]} to {param.rows[1] - 1} of axis {param.axis}"
    shape = "x".join(map(str, param.shape))
    return param.path, shape, what, "-", "-", f"{param.trainable:,}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows of text in columns: the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [
            cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def count_parameters(params: Mapping[str, Any]) -> int:
    """Return the number of parameters of a tree of arrays or ShapeDtypeStructs."""
    return sum(math.prod(leaf.shape) for leaf in paths.flatten(params).values())


def quantized_kernels(params: Mapping[str, Any]) -> str:
    """Return how many kernels of the base are quantized, and in how many bits."""
    leaves = paths.flatten(params).values()
    found = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    if not found:
        return ""
    formats = ", ".join(sorted({leaf.format for leaf in found}))
    size = sum(leaf.nbytes for leaf in found)
    bits = 8 * size / sum(math.prod(leaf.shape) for leaf in found)
    return (
        f"{len(found)} kernels of the base in {formats}: {size / 1e9:.3f} GB, "
        f"{bits:.2f} bits a weight"
    )


def _when(launch_step: int | None, auto_launch: AutoLaunchConfig | None) -> str:
    if auto_launch is not None:
        between = f"between step {auto_launch.launch_min} and {auto_launch.launch_max}"
        return f"launch once directions have settled, {between}"
    return "no launch" if launch_step is None else f"launch after step {launch_step}"


def describe(
    spec: Spec,
    params: Mapping[str, Any],
    launch_step: int | None,
    steps: int,
    auto_launch: AutoLaunchConfig | None = None,
) -> str:
    """Return what a run trains, in words: a table of kernels, then the totals.

    Args:
      spec: of `make_spec`.
      params: the base's tree, for its size.
      launch_step: of the launch; None for a method without one.
      steps: of the run.
      auto_launch: what decides instead of `launch_step`.
    """
    total = count_parameters(params)
    frozen = total - sum(param.trainable for param in spec.full)
    base = quantized_kernels(params)
    method = spec.method.name + (" (keep)" if spec.method.keep else "")
    if any(kernel.dora for kernel in spec.kernels):
        method += " on DoRA"
    when = _when(launch_step, auto_launch)
    return (
        table([_HEAD, *map(_row, spec.kernels), *map(_full_row, spec.full)])
        + (f"\n{base}" if base else "")
        + f"\nmethod {method}, {when}, {steps} steps"
        + f"\ntrainable {spec.trainable:,} beside {frozen:,} frozen parameters "
        + f"({100 * spec.trainable / total:.2f} %)"
    )
