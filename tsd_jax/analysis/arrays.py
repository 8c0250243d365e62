"""Arrays from what a run leaves: its metrics, its directions, what it learned."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.adapter import Directions, Trainable, low_rank_factors
from tsd_jax.core.errors import InputError

Row = Mapping[str, Any]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a last line cut off by a crash is left out.

    Raises:
      InputError: there is no such file, or it is not JSON lines.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a run's metrics.jsonl") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}, line {number} is not JSON") from None
    return rows


def series(metrics: Iterable[Row], kind: str, name: str) -> np.ndarray:
    """Return (steps, values) of one figure, (2, N) float64, in the order of the file.

    Args:
      metrics: rows of `read_metrics`.
      kind: of the row: "train", "eval" or "launch".
      name: of the figure; rows without it are left out.
    """
    pairs = [
        (row["step"], row[name])
        for row in metrics
        if row.get("kind") == kind and name in row
    ]
    return np.asarray(pairs, np.float64).reshape(-1, 2).T


def subspace_overlap(
    left: np.ndarray, down: np.ndarray, up: np.ndarray
) -> np.ndarray | np.float64:
    """Compare launched directions with the change that was learned, in float64.

    The mean squared cosine of the principal angles between span(L) and span(U_d), the
    d dominant left singular vectors of dK = down @ up:

        overlap = |L^T U_d|_F^2 / d,   d = min(c, rank dK)

    1 if one holds the other, d / in on average for random subspaces, 0 without a
    change. dK is never formed: its left singular vectors come from two thin QRs.

    Args:
      left: L, (*batch, in, c), orthonormal; zero columns count as absent.
      down: (*batch, in, R). up: (*batch, R, out), as `low_rank_factors` gives them.

    Returns:
      (*batch,) in [0, 1].

    Source: principal angles, Bjorck and Golub 1973.
    """
    left, down, up = (np.asarray(x, np.float64) for x in (left, down, up))
    basis, r_down = np.linalg.qr(down)
    _, r_up = np.linalg.qr(up.swapaxes(-1, -2))
    u, strength, _ = np.linalg.svd(r_down @ r_up.swapaxes(-1, -2))
    noise = max(left.shape[-2], up.shape[-1]) * np.finfo(np.float64).eps
    real = strength > noise * strength[..., :1]
    count = np.minimum(left.any(axis=-2).sum(-1), real.sum(-1))
    wanted = np.arange(real.shape[-1]) < count[..., None]
    u = (basis @ u)[..., : real.shape[-1]] * wanted[..., None, :]
    squares = np.sum((left.swapaxes(-1, -2) @ u) ** 2, axis=(-2, -1))
    return squares / np.maximum(count, 1)


def learned_overlap(
    trainable: Trainable, directions: Mapping[str, Directions]
) -> dict[str, np.ndarray]:
    """Return every launched kernel's `subspace_overlap`: {kernel path: (matrices,)}.

    Args:
      trainable: trained, on this host; its `full` parameters are left out.
      directions: {kernel path: Directions}; kernels that have none are left out.
    """
    overlaps = {}
    for path, adapter in trainable.adapters.items():
        left = directions[path].left
        if left is not None:
            down, up = low_rank_factors(adapter, directions[path])
            # Behind the launched columns may lie what `keep` froze.
            left = np.asarray(left)[..., : adapter.kernel.ranked]
            overlap = subspace_overlap(left, np.asarray(down), np.asarray(up))
            overlaps[path] = np.reshape(overlap, -1)
    return overlaps


def by_kind(values: Mapping[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Sort what belongs to kernels by kind of kernel and layer: {kind: {layer: row}}.

    "layers/mlp/up_proj/kernel" of a scanned model, with a row per layer, and
    "layers_0/mlp/up_proj/kernel", ... of one that is not, both are "mlp/up_proj".

    Args:
      values: {kernel path: (matrices, ...)}.
    """
    kinds: dict[str, dict[int, np.ndarray]] = {}
    for path, rows in values.items():
        numbered = re.search(r"_(\d+)(?=/)", path)
        first = int(numbered[1]) if numbered else 0
        kind = re.sub(r"_\d+(?=/)", "", path, count=1)
        kind = kind.removesuffix("/kernel").removeprefix("layers/")
        for layer, row in enumerate(rows, start=first):
            kinds.setdefault(kind, {})[layer] = row
    return kinds


def table(
    values: Mapping[str, Mapping[int, Any]],
) -> tuple[list[int], np.ndarray]:
    """Lay out the scalars of `by_kind`: the layers there are, and (kinds, layers).

    float64, nan where a kind has nothing in a layer.
    """
    layers = sorted({layer for rows in values.values() for layer in rows})
    cells = [[rows.get(layer, np.nan) for layer in layers] for rows in values.values()]
    return layers, np.asarray(cells, np.float64)
