"""Maps of a run: a number for every kind of kernel and layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tsd_jax.analysis.arrays import by_kind, table
from tsd_jax.analysis.plots import INK, save
from tsd_jax.core.errors import InputError
from tsd_jax.storage.directions_file import LaunchRecord

SHARES: Colormap = LinearSegmentedColormap.from_list(
    "shares", ["#e4eef7", "#9cc3e3", "#4f8fc4", "#1f4e79", "#12304d"]
)


def plot_overlap(overlaps: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Draw how much of what was learned lies in the launched directions, as a map.

    Args:
      overlaps: {kernel path: (matrices,)} of `subspace_overlap`.
      path: of the PNG.
    """
    if not overlaps:
        raise InputError("there are no overlaps to draw")
    title = "Overlap of launched directions and learned change"
    _plot_map(by_kind(overlaps), path, title, "mean cos² of principal angles", 1.0)


def plot_gains(directions: Mapping[str, LaunchRecord], path: str | Path) -> None:
    """Draw how many directions every matrix trains, as a map.

    Args:
      directions: of `read_directions`; kernels whose number is fixed are left out.
      path: of the PNG.
    """
    used = {name: s.used for name, s in directions.items() if s.used is not None}
    if not used:
        raise InputError("the number of directions is fixed: there is none to draw")
    most = max(int(counts.max()) for counts in used.values())
    title = "Directions before the knee of the change rates"
    _plot_map(by_kind(used), path, title, "directions with a gain", most)


def _plot_map(
    values: Mapping[str, Mapping[int, Any]],
    path: str | Path,
    title: str,
    label: str,
    most: float,
) -> None:
    """Draw a scalar from 0 to `most` for every kind of kernel and layer."""
    layers, cells = table(values)
    every = max(1, len(layers) // 16)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        image = axis.imshow(cells, cmap=SHARES, vmin=0, vmax=most, aspect="auto")
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_yticks(range(len(values)), list(values))
        axis.set_xticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
        axis.set_xlabel("layer")
        axis.set_title(title)
        if len(layers) <= 16:
            _write_cells(axis, cells, most)
        bar = figure.colorbar(image, ax=axis, shrink=0.9, pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)
        if isinstance(most, int):
            bar.locator = MaxNLocator(integer=True)

    width = 3.6 + min(0.55 * len(layers), 9)
    save(draw, path, (max(width, 5.5), max(1.4 + 0.42 * len(values), 3.0)))


def _write_cells(axis: Axes, cells: np.ndarray, most: float) -> None:
    digits = 0 if isinstance(most, int) else 2
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            color = "white" if value > 0.45 * most else INK
            text = f"{value:.{digits}f}"
            axis.text(column, row, text, ha="center", va="center", color=color)
