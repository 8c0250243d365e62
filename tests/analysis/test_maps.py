from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.analysis.test_plots import pixels, spectrum
from tsd_jax.analysis.maps import SHARES, plot_gains, plot_overlap
from tsd_jax.core.errors import InputError
from tsd_jax.storage.directions_file import LaunchRecord


def test_overlap_colours_each_cell_by_its_value(tmp_path):
    values = [0.0, 0.2, 0.9]
    overlaps = {
        "layers/q/kernel": np.asarray(values),
        "layers_1/up/kernel": np.asarray([0.55]),
    }
    plot_overlap(overlaps, tmp_path / "overlap.png")
    areas, places = [], []
    for value in [*values, 0.55]:
        cell = pixels(tmp_path / "overlap.png", SHARES(value))
        areas.append(cell.mean())
        places.append([axis.mean() for axis in np.nonzero(cell)])
    assert min(areas) > 0.05
    rows, columns = np.transpose(places)
    assert columns[0] < columns[1] < columns[2]
    assert columns[3] == pytest.approx(columns[1], abs=10)
    assert rows[3] > rows[1] + 50


def test_gains_are_counted_where_a_knee_decides(tmp_path, monkeypatch):
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    fixed, counts = spectrum(2), {"up": [3, 1], "q": [12, 7]}
    decided = {
        f"layers/{name}/kernel": LaunchRecord(
            fixed.sigma, fixed.rates, fixed.indices, np.array(used)
        )
        for name, used in counts.items()
    }
    plot_gains(decided | {"lm_head/kernel": fixed}, tmp_path / "gains.png")
    axis = saved[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["up", "q"]
    assert [text.get_text() for text in axis.texts] == ["3", "1", "12", "7"]
    (image,) = axis.images
    assert image.get_clim() == (0, 12)
    np.testing.assert_array_equal(image.get_array(), [[3, 1], [12, 7]])


def test_nothing_to_map(tmp_path):
    path = tmp_path / "plot.png"
    with pytest.raises(InputError, match="no overlaps"):
        plot_overlap({}, path)
    with pytest.raises(InputError, match="number of directions is fixed"):
        plot_gains({"up/kernel": spectrum(1)}, path)
    assert not path.exists()
