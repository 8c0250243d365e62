from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from tsd_jax.analysis.plots import (
    LAUNCH,
    STYLE,
    plot_loss,
    plot_spectra,
)
from tsd_jax.core.errors import InputError
from tsd_jax.storage.directions_file import LaunchRecord


def pixels(path: Path, color) -> np.ndarray:
    """Where the image has this colour, (height, width) bool."""
    image = imread(path)[..., :3]
    return np.abs(image - np.asarray(to_rgb(color))).max(-1) < 1.5 / 255


def metrics(*, evaluation: bool = True) -> list[dict]:
    train = [
        {"kind": "train", "step": n, "loss": 5 * 0.98**n} for n in range(10, 101, 10)
    ]
    shares = [
        {"kind": "eval", "step": n, "nll": 3.0, "accuracy": 0.5} for n in (0, 100)
    ]
    return train + shares if evaluation else train


def spectrum(matrices: int, size: int = 24, launched: int = 4) -> LaunchRecord:
    rng = np.random.default_rng(size)
    sigma = np.tile(np.geomspace(10, 0.01, size), (matrices, 1))
    rates = np.abs(rng.normal(size=(matrices, size)))
    rates[:, -1] = 0
    return LaunchRecord(sigma, rates, np.argsort(-rates, axis=1)[:, :launched])


def test_loss_shows_the_launch_at_its_step(tmp_path):
    columns = {}
    for step in (25, 75):
        plot_loss(metrics(evaluation=False), step, tmp_path / "loss.png")
        marked = pixels(tmp_path / "loss.png", LAUNCH)
        columns[step] = int(np.argmax(marked.sum(0)))
        # The line is as high as the panel.
        assert marked.sum(0).max() > 0.8 * marked.shape[0]
        width = marked.shape[1]
    assert (columns[75] - columns[25]) / width == pytest.approx(0.45, abs=0.05)
    plot_loss(metrics(evaluation=False), None, tmp_path / "loss.png")
    assert not pixels(tmp_path / "loss.png", LAUNCH).any()


def test_loss_gives_shares_a_panel_of_their_own(tmp_path):
    plot_loss(metrics(evaluation=False), 20, tmp_path / "small.png")
    plot_loss(metrics(), 20, tmp_path / "large.png")
    heights = [imread(tmp_path / f"{n}.png").shape[0] for n in ("small", "large")]
    assert heights == [600, 810]


@pytest.mark.parametrize(
    "rows",
    [
        [{"kind": "eval", "step": 0, "accuracy": 0.5}],
        [{"kind": "eval", "step": 0, "nll": float("inf")}],
        [{"kind": "train", "step": 1, "loss": 3.0}],
    ],
    ids=["accuracy", "infinite", "one step"],
)
def test_loss_of_little_is_drawn_without_a_warning(tmp_path, rows):
    plot_loss(rows, None, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").std() > 0


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Collects the figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def marked(axis: Axes) -> list[np.ndarray]:
    """The points that are marked as launched, (2, n) for each layer."""
    lines = [line for line in axis.lines if line.get_color() == LAUNCH]
    points = [np.asarray(line.get_data()) for line in lines]
    return [xy for xy in points if xy.size]


@pytest.mark.parametrize(("kinds", "rows"), [(1, 1), (3, 1), (7, 2)])
def test_spectra_mark_launched_directions_in_every_panel(
    tmp_path, figures, kinds, rows
):
    spectra = {f"layers/p{n}/kernel": spectrum(2, 20 + n) for n in range(kinds)}
    plot_spectra(spectra, tmp_path / "spectra.png")
    columns = min(kinds, 4)
    *axes, bar = figures[0].axes
    assert bar.get_ylabel() == "layer"
    assert len(axes) == 2 * rows * columns
    for place, (path, seen) in enumerate(spectra.items()):
        above = 2 * columns * (place // columns) + place % columns
        pair = axes[above], axes[above + columns]
        assert pair[0].get_title(loc="left") == path.split("/")[1]
        for axis, values in zip(pair, (seen.sigma, seen.rates), strict=True):
            # What the axis does, not what it says: shared ones may differ.
            assert axis.transScale.transform((0, 100))[1] == pytest.approx(2)
            expected = [(i, v[i]) for i, v in zip(seen.indices, values, strict=True)]
            np.testing.assert_array_equal(marked(axis), expected)
        curves = [line.get_ydata() for line in pair[0].lines[:2]]
        np.testing.assert_array_equal(curves, seen.sigma)
        dots = np.ma.getdata(pair[1].collections[0].get_offsets())
        assert len(dots) == seen.rates.size
        np.testing.assert_array_equal(dots[:, 0] % 1, 0)
    assert sum(axis.axison for axis in axes) == 2 * kinds


def test_a_gain_is_a_dot_and_none_is_a_ring(tmp_path, figures):
    """Those before the knee, in each matrix its own number."""
    seen = spectrum(2)
    seen = LaunchRecord(seen.sigma, seen.rates, seen.indices, np.array([3, 1]))
    plot_spectra({"layers/up/kernel": seen}, tmp_path / "spectra.png")
    above, below, _ = figures[0].axes
    for axis, values in ((above, seen.sigma), (below, seen.rates)):
        lines = [line for line in axis.lines if line.get_color() == LAUNCH]
        lines = [line for line in lines if len(np.asarray(line.get_xdata()))]
        rings = [line.get_markerfacecolor() == "none" for line in lines]
        assert rings == [False, True, False, True]
        parts = [seen.indices[0][:3], seen.indices[0][3:]]
        parts += [seen.indices[1][:1], seen.indices[1][1:]]
        for line, part, row in zip(lines, parts, (0, 0, 1, 1), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), part)
            np.testing.assert_array_equal(line.get_ydata(), values[row][part])
    names = [text.get_text() for text in above.get_legend().get_texts()]
    assert names == ["with a gain", "without one"]


def test_one_layer_needs_no_scale_of_layers(tmp_path, figures):
    plot_spectra({"lm_head/kernel": spectrum(1)}, tmp_path / "spectra.png")
    assert len(figures[0].axes) == 2


def test_spectra_of_a_kernel_without_rates(tmp_path):
    still = spectrum(3)
    still = LaunchRecord(still.sigma, 0 * still.rates, still.indices)
    plot_spectra({"layers/up/kernel": still}, tmp_path / "spectra.png")
    assert imread(tmp_path / "spectra.png").std() > 0


def test_many_dots_are_thinned(tmp_path, figures):
    spectra = {"layers/up/kernel": spectrum(8, 1000), "lm_head/kernel": spectrum(1)}
    plot_spectra(spectra, tmp_path / "spectra.png")
    dots = [len(a.collections[0].get_offsets()) for a in figures[0].axes[2:4]]
    assert dots == [6000, 24]


def test_plots_leave_no_trace_and_are_deterministic(tmp_path):
    for name in ("a.png", "b.png"):
        plot_spectra({"layers/up/kernel": spectrum(2)}, tmp_path / name)
    style = {name: mpl.rcParams[name] for name in STYLE}
    assert style == {name: mpl.rcParamsOrig[name] for name in STYLE}
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "plot.png"
    with pytest.raises(InputError, match="neither a loss nor an evaluation"):
        plot_loss([{"kind": "launch", "step": 3}], 3, path)
    with pytest.raises(InputError, match="no directions"):
        plot_spectra({}, path)
    assert not path.exists()
