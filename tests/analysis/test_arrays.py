from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from tsd_jax.analysis.arrays import (
    by_kind,
    learned_overlap,
    read_metrics,
    series,
    subspace_overlap,
    table,
)
from tsd_jax.core.adapter import Adapter, Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import KernelSpec

ROWS = [
    {"kind": "eval", "step": 0, "nll": 5.5},
    {"kind": "train", "step": 10, "loss": 4.0},
    {"kind": "launch", "step": 10, "extract_seconds": 0.5},
    {"kind": "train", "step": 20, "loss": 3.0, "grad_norm": 1.0},
]


def test_metrics_survive_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"kind": "tr')
    assert read_metrics(path) == ROWS


def test_bad_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(InputError, match=r"metrics\.jsonl does not exist"):
        read_metrics(path)
    path.write_text('{"kind": "train"}\nstep 3\n{}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_metrics(path)


def test_series_takes_one_figure_of_one_kind():
    np.testing.assert_array_equal(series(ROWS, "train", "loss"), [[10, 20], [4, 3]])
    np.testing.assert_array_equal(series(ROWS, "train", "grad_norm"), [[20], [1]])
    assert series(ROWS, "eval", "loss").shape == (2, 0)


def orthonormal(rng, *shape: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=shape))[0]


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "launched"),
    [(20, 15, 6, 4), (20, 15, 3, 8), (5, 30, 9, 4), (30, 5, 9, 4)],
)
def test_overlap_is_that_of_the_dense_change(rows, columns, rank, launched):
    rng = np.random.default_rng(rows + rank)
    left = orthonormal(rng, 3, rows, launched)
    down = rng.normal(size=(3, rows, rank))
    up = rng.normal(size=(3, rank, columns))
    expected = []
    for basis, dense in zip(left, down @ up, strict=True):
        u, strength, _ = np.linalg.svd(dense)
        count = min(launched, np.sum(strength > 1e-9 * strength[0]))
        expected.append(np.mean(np.cos(subspace_angles(basis, u[:, :count])) ** 2))
    overlap = subspace_overlap(left, down, up)
    np.testing.assert_allclose(overlap, expected, rtol=1e-10)
    assert 0.05 < overlap.min() < overlap.max() <= 1


def test_overlap_at_its_ends():
    rng = np.random.default_rng(0)
    basis = orthonormal(rng, 12, 8)
    up = rng.normal(size=(4, 9))
    same, other = basis[:, :4], basis[:, 4:]
    mixed = same @ rng.normal(size=(4, 4))
    assert subspace_overlap(same, mixed, up) == pytest.approx(1, abs=1e-12)
    assert subspace_overlap(other, mixed, up) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(same, mixed, 0 * up) == 0
    # A rank lost in the product, and columns of L that are not used.
    assert subspace_overlap(same, mixed[:, [0, 0]], up[:2]) == pytest.approx(1)
    padded = np.concatenate([same[:, :2], 0 * other], axis=1)
    expected = subspace_overlap(same[:, :2], mixed, up)
    assert subspace_overlap(padded, mixed, up) == pytest.approx(expected)
    assert expected < 1


def test_overlap_of_adapters_looks_at_the_launched_columns_only():
    rng = np.random.default_rng(0)
    kernel = KernelSpec(
        path="up/kernel",
        shape=(2, 12, 9),
        layout=Layout((0,), (1,), (2,)),
        rank=3,
        alpha=6.0,
        scale=2.0,
        gains=2,
        ranked=2,
        columns=5,
        dropout=0.0,
    )
    left = orthonormal(rng, 2, 12, 5)
    right = rng.normal(size=(2, 9, 5))
    a, b = rng.normal(size=(2, 12, 3)), rng.normal(size=(2, 3, 9))
    gain, offset = rng.normal(size=(2, 2)), rng.normal(size=(2, 5))
    trained = [jnp.asarray(x, jnp.float32) for x in (a, b, gain)]
    frozen = [jnp.asarray(x, jnp.float32) for x in (left, right, offset)]
    adapter = Adapter(trained[0], trained[1], trained[2], kernel)
    adapters = {"up/kernel": adapter, "lora/kernel": adapter.replace(gain=None)}
    overlaps = learned_overlap(
        Trainable(adapters=adapters),
        {
            "up/kernel": Directions(*frozen),
            "lora/kernel": Directions(None, None, None),
        },
    )
    weights = offset + np.pad(gain, ((0, 0), (0, 3)))
    dense = 2 * a @ b + (left * weights[:, None]) @ right.swapaxes(1, 2)
    expected = [
        np.mean(np.cos(subspace_angles(basis[:, :2], np.linalg.svd(k)[0][:, :2])) ** 2)
        for basis, k in zip(left, dense, strict=True)
    ]
    assert list(overlaps) == ["up/kernel"]
    np.testing.assert_allclose(overlaps["up/kernel"], expected, atol=1e-5)


def test_kinds_are_the_same_scanned_or_not():
    rows = np.arange(6.0).reshape(3, 2)
    scanned = by_kind({"layers/mlp/up/kernel": rows, "lm_head/kernel": rows[:1]})
    apart = by_kind(
        {f"layers_{n}/mlp/up/kernel": rows[n : n + 1] for n in range(3)}
        | {"lm_head/kernel": rows[:1]}
    )
    assert list(scanned) == list(apart) == ["mlp/up", "lm_head"]
    jax.tree.map(np.testing.assert_array_equal, scanned, apart)
    assert list(scanned["mlp/up"]) == [0, 1, 2]
    np.testing.assert_array_equal(scanned["mlp/up"][1], rows[1])


def test_table_leaves_gaps():
    layers, cells = table({"up": {1: 0.5, 3: 0.7}, "down": {3: 0.2}})
    assert layers == [1, 3]
    np.testing.assert_array_equal(cells, [[0.5, 0.7], [np.nan, 0.2]])
