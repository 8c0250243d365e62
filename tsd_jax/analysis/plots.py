"""Plots of a run: its loss, its spectra and change rates.

Figures are drawn on their own canvas: no pyplot, no display, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tsd_jax.analysis.arrays import Row, by_kind, series
from tsd_jax.core.errors import InputError
from tsd_jax.storage.directions_file import LaunchRecord

# One hue from light to dark for layers, and one colour apart for what launch chose.
RAMP: Colormap = LinearSegmentedColormap.from_list(
    "layers", ["#b9d3ea", "#4f8fc4", "#1f4e79", "#0b1f33"]
)
LAUNCH = "#d1495b"
INK, BLUE, MUTED, GRID = "#22303c", "#4f8fc4", "#6b7885", "#e3e8ed"
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
}
COLUMNS = 4
# More dots than this in a panel hide each other.
DOTS = 6000


class Matrix(NamedTuple):
    """What launch saw in one matrix; see `LaunchRecord`."""

    sigma: np.ndarray
    rates: np.ndarray
    indices: np.ndarray
    gains: np.ndarray


def plot_loss(
    metrics: Sequence[Row], launch_step: int | None, path: str | Path
) -> None:
    """Draw the training loss and the evaluations over steps, with the launch marked.

    Evaluated NLL shares the loss's axis; shares (accuracy, exact match) get a panel of
    their own below.

    Args:
      metrics: rows of `read_metrics`.
      launch_step: None where there is no launch.
      path: of the PNG.

    Raises:
      InputError: there is neither a loss nor an evaluation to draw.
    """
    shares = {n: series(metrics, "eval", n) for n in ("accuracy", "exact_match")}
    shares = {name: figures for name, figures in shares.items() if figures.size}
    loss, nll = series(metrics, "train", "loss"), series(metrics, "eval", "nll")
    if not (loss.size or nll.size or shares):
        raise InputError("the metrics hold neither a loss nor an evaluation")
    last = max(row["step"] for row in metrics)

    def draw(figure: Figure) -> None:
        heights = [3.0, 1.3] if shares else [3.0]
        axes = figure.subplots(
            len(heights), 1, sharex=True, squeeze=False, height_ratios=heights
        )[:, 0]
        _draw_losses(axes[0], loss, nll)
        if shares:
            _draw_shares(axes[-1], shares)
        for axis in axes:
            axis.set_xlim(0, max(last, 1))
            if launch_step is not None:
                _mark_launch(axis, launch_step)
        if launch_step is not None:
            _name_launch(axes[0], launch_step)
        axes[-1].set_xlabel("optimizer step")

    save(draw, path, (7.5, 5.4 if shares else 4.0))


def plot_spectra(directions: Mapping[str, LaunchRecord], path: str | Path) -> None:
    """Draw singular values and change rates of every kernel over their index.

    One pair of panels per kind of kernel; layers are a colour ramp, launched
    directions are marked, those that a knee left without a gain by rings. Rates of 0
    (numerical null space) are not drawn.

    Args:
      directions: of `read_directions`.
      path: of the PNG.
    """
    if not directions:
        raise InputError("there are no directions to draw")
    spectra = _spectra_by_kind(directions)
    count = 1 + max(layer for layers in spectra.values() for layer in layers)
    columns = min(COLUMNS, len(spectra))
    rows = math.ceil(len(spectra) / columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2 * rows, columns, squeeze=False)
        for half in (axes[::2].ravel(), axes[1::2].ravel()):
            for axis in half[1:]:
                axis.sharey(half[0])
            # After the axes are shared, or the others stay linear; before there are
            # data, or a panel of zeros is an error.
            half[0].set_yscale("log")
        pairs = axes.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
        for place, (kind, layers) in enumerate(spectra.items()):
            _draw_spectrum(pairs[place], kind, layers, count)
            _label_spectrum(pairs[place], first=place % columns == 0)
        if any(spectrum.used is not None for spectrum in directions.values()):
            _name_marks(pairs[0][0], "with a gain", "without one")
        else:
            _name_marks(pairs[0][0], "launched")
        for axis in pairs[len(spectra) :].flat:
            axis.set_axis_off()
        if count > 1:
            _layer_bar(figure, axes.ravel().tolist(), count)

    save(draw, path, (1.6 + 3.1 * columns, 0.5 + 4.2 * rows))


def save(
    draw: Callable[[Figure], None], path: str | Path, size: tuple[float, float]
) -> None:
    """Let `draw` fill a figure in the common style, and write it as PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(figure)
        figure.savefig(path, dpi=150, format="png")


def _draw_losses(axis: Axes, loss: np.ndarray, nll: np.ndarray) -> None:
    # Not clipped: the first and the last points lie on the panel's edge.
    if loss.size:
        axis.plot(*loss, color=BLUE, lw=1.6, clip_on=False, label="training loss")
    if nll.size:
        style: dict[str, Any] = {"color": INK, "lw": 1, "ms": 5, "clip_on": False}
        axis.plot(*nll, "o--", **style, label="evaluation NLL")
    axis.set_ylabel("nats per token")
    if axis.lines:
        axis.legend(loc="upper right")


def _draw_shares(axis: Axes, shares: Mapping[str, np.ndarray]) -> None:
    for (name, figures), color in zip(shares.items(), (INK, BLUE), strict=False):
        style: dict[str, Any] = {"color": color, "lw": 1.2, "ms": 5, "clip_on": False}
        axis.plot(*figures, "o-", **style, label=name.replace("_", " "))
    axis.set(ylim=(-0.05, 1.05), ylabel="share")
    axis.legend(loc="best")


def _mark_launch(axis: Axes, step: int) -> None:
    axis.axvline(step, color=LAUNCH, lw=1.4, zorder=1)
    axis.axvspan(0, step, color=LAUNCH, alpha=0.06, lw=0, zorder=0)


def _name_launch(axis: Axes, step: int) -> None:
    """Write above the panel what the line is."""
    axis.annotate(
        f"launch, step {step}",
        (step, 1),
        (0, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=LAUNCH,
        ha="center",
        va="bottom",
    )


def _spectra_by_kind(
    directions: Mapping[str, LaunchRecord],
) -> dict[str, dict[int, Matrix]]:
    """Return {kind: {layer: Matrix}}."""
    fields = [
        by_kind({path: getattr(s, name) for path, s in directions.items()})
        for name in Matrix._fields
    ]
    return {
        kind: {
            layer: Matrix(*(field[kind][layer] for field in fields)) for layer in layers
        }
        for kind, layers in fields[0].items()
    }


def _draw_spectrum(
    axes: Sequence[Axes],
    kind: str,
    layers: Mapping[int, Matrix],
    count: int,
) -> None:
    """Draw one kind of kernel: singular values above, change rates below."""
    above, below = axes
    for layer, matrix in sorted(layers.items()):
        above.plot(_positive(matrix.sigma), color=_shade(layer, count), lw=1.1)
    size = _draw_rates(below, layers, count)
    for sigma, rates, indices, gains in layers.values():
        for axis, values in ((above, sigma), (below, rates)):
            for chosen, ring in ((indices[gains], False), (indices[~gains], True)):
                if len(chosen):
                    heights = _positive(values)[chosen]
                    axis.plot(chosen, heights, zorder=3, **_mark(1.5 + size, ring))
    above.set_title(kind)
    above.sharex(below)
    above.tick_params(labelbottom=False)
    below.set_xlabel("index, by descending σ")


def _draw_rates(
    axis: Axes,
    layers: Mapping[int, Matrix],
    count: int,
) -> float:
    """Draw dots in mixed order, so that no layer hides another; many are thinned.

    Gives the size of a dot.
    """
    sizes = [len(matrix.rates) for matrix in layers.values()]
    index = np.concatenate([np.arange(size) for size in sizes])
    rates = np.concatenate([_positive(matrix.rates) for matrix in layers.values()])
    colors = np.repeat([_shade(layer, count) for layer in layers], sizes, axis=0)
    shown = np.random.default_rng(0).permutation(len(index))[:DOTS]
    dot = float(np.clip(90 / np.sqrt(len(shown)), 1.5, 5))
    axis.scatter(index[shown], rates[shown], dot**2, colors[shown], alpha=0.7, lw=0)
    return dot


def _shade(layer: int, count: int) -> tuple[float, float, float, float]:
    return RAMP(layer / (count - 1) if count > 1 else 0.6)


def _label_spectrum(axes: Sequence[Axes], *, first: bool) -> None:
    """Name the axes of the first pair in a row; the others share its scales."""
    above, below = axes
    if not first:
        for axis in axes:
            axis.tick_params(labelleft=False)
        return
    above.set_ylabel("singular value σ")
    below.set_ylabel("change rate ρ")


def _mark(size: float, ring: bool) -> dict[str, Any]:
    """Style the mark of a launched direction: a dot, or a ring."""
    fill: dict[str, Any] = {"mfc": "none", "mew": 0.8} if ring else {"mew": 0}
    return {
        "color": LAUNCH,
        "ls": "none",
        "marker": "o",
        "ms": size,
        "alpha": 0.8,
    } | fill


def _name_marks(axis: Axes, *names: str) -> None:
    for ring, name in enumerate(names):
        axis.plot([], [], label=name, **_mark(4, bool(ring)))
    axis.legend(loc="lower left", handletextpad=0.1)


def _layer_bar(figure: Figure, axes: Sequence[Axes], count: int) -> None:
    scale = ScalarMappable(Normalize(0, count - 1), RAMP)
    bar = figure.colorbar(scale, ax=axes, shrink=0.5, aspect=40, pad=0.01)
    bar.set_label("layer")
    bar.locator = MaxNLocator(integer=True)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _positive(values: np.ndarray) -> np.ndarray:
    """Take out what a log axis cannot show."""
    return np.where(values > 0, values, np.nan)
