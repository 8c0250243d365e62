"""The change of each torch module as two factors, and its best approximation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tsd_jax.core.adapter import Adapter, Directions, low_rank_factors
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.names import ModuleName, axis_indices, stack_indices


class Factors(NamedTuple):
    """dK = down @ up of one matrix.

    With DoRA the adapted kernel is m o (K + dK) / ||K + dK||, by columns.

    Attributes:
      down: (in, r).
      up: (r, out).
      magnitude: m, (out,), or None without DoRA.
    """

    down: np.ndarray
    up: np.ndarray
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Columns of `down`."""
        return self.down.shape[1]

    def applied(self, weight: np.ndarray) -> np.ndarray:
        """Return the adapted weight.

        Args:
          weight: of torch, (out, in).
        """
        total = weight + (self.down @ self.up).T
        if self.magnitude is None:
            return total
        norms = np.linalg.norm(total, axis=1)
        scale = np.where(norms > 0, self.magnitude / np.where(norms > 0, norms, 1), 1)
        return scale[:, None].astype(total.dtype) * total


class Compressed(NamedTuple):
    """Factors of fewer columns, and what that cost.

    Attributes:
      factors: of dK', with the new rank.
      lost: ||dK - dK'||_F.
      norm: ||dK||_F.
    """

    factors: Factors
    lost: float
    norm: float


def module_factors(
    adapters: Mapping[str, Adapter],
    directions: Mapping[str, Directions],
    module_name: ModuleName,
) -> dict[str, Factors]:
    """Return {torch module: its factors in float32}, one for each stacked matrix.

    Zero columns of `down` are left out, except for one: rank 0 is not allowed.

    Args:
      adapters: {kernel path: Adapter}, on this host.
      directions: {kernel path: Directions}.
      module_name: (path, index of a stacked leaf or None) -> name of the torch module.

    Raises:
      InputError: there is no adapter, or two kernels have the same module name.
    """
    if not adapters:
        raise InputError("there are no adapters to export")
    factors: dict[str, Factors] = {}
    for path, adapter in adapters.items():
        modules = _modules(path, adapter, directions[path], module_name)
        twice = modules.keys() & factors.keys()
        if twice:
            raise InputError(
                f"{path}: another kernel has the module name {min(twice)!r} already"
            )
        factors |= modules
    return factors


def compress(factors: Factors, rank: int) -> Compressed:
    """Return the best factors of at most `rank` columns (Eckart and Young), balanced.

        down = Q_d R_d,  up^T = Q_u R_u,  R_d R_u^T = U S V^T,
        down' = Q_d U_k sqrt(S_k),  up' = sqrt(S_k) (Q_u V_k)^T

    Works on the factors alone, in float64; the dense dK is never formed. Factors with
    no more than `rank` columns are returned as they are. DoRA's magnitudes stay:
    columns keep their norms, and only their directions change.

    Args:
      factors: of dK.
      rank: the largest allowed.

    Raises:
      InputError: the factors are not finite, or `rank` is below 1.
    """
    if rank < 1:
        raise InputError(f"max_rank must be at least 1, not {rank}")
    require_finite(factors, "the matrix")
    q_down, r_down = np.linalg.qr(factors.down.astype(np.float64))
    q_up, r_up = np.linalg.qr(factors.up.T.astype(np.float64))
    u, s, v_t = np.linalg.svd(r_down @ r_up.T)
    norm = float(np.linalg.norm(s))
    if factors.rank <= rank:
        return Compressed(factors, 0.0, norm)
    root = np.sqrt(s[:rank])
    down = (q_down @ u[:, :rank]) * root
    up = root[:, None] * (v_t[:rank] @ q_up.T)
    small = Factors(down.astype(np.float32), up.astype(np.float32), factors.magnitude)
    return Compressed(small, float(np.linalg.norm(s[rank:])), norm)


def require_finite(factors: Factors, name: str) -> None:
    """Raise InputError if a factor holds infinities or NaNs.

    Args:
      factors: of dK.
      name: of the adapted module, for messages.
    """
    if not all(np.isfinite(x).all() for x in factors if x is not None):
        raise InputError(
            f"the adapter of {name} holds values that are not finite: its training "
            "diverged"
        )


def relative(lost: float, norm: float) -> float:
    """Return lost / norm; 0 if both are 0."""
    return lost / norm if norm else 0.0


def total(pairs: Mapping[str, tuple[float, float]]) -> float:
    """Return the relative error of all matrices as one, from {_: (lost, norm)}."""
    lost, norm = np.sqrt(np.square(list(pairs.values())).sum(axis=0))
    return relative(float(lost), float(norm))


def _modules(
    path: str, adapter: Adapter, directions: Directions, module_name: ModuleName
) -> dict[str, Factors]:
    """Return the factors of every torch module of one, perhaps stacked, kernel."""
    down, up = (
        np.asarray(x, np.float32) for x in low_rank_factors(adapter, directions)
    )
    magnitude = adapter.magnitude
    found = {}
    for index in stack_indices(down.shape[:-2]):
        one = axis_indices(index)
        factors = _trim(down[one], up[one], adapter.kernel.rank)
        if magnitude is not None:
            norms = np.ascontiguousarray(np.asarray(magnitude, np.float32)[one])
            factors = factors._replace(magnitude=norms)
        found[module_name(path, index)] = factors
    return found


def _trim(down: np.ndarray, up: np.ndarray, rank: int) -> Factors:
    """Leave out columns that add nothing, except for one: rank 0 is not allowed.

    Columns of A stay even if B is zero, as it is before training.
    """
    coordinates = np.any(up != 0, axis=1)
    coordinates[:rank] = True
    used = np.flatnonzero(np.any(down != 0, axis=0) & coordinates)
    used = used if len(used) else [0]
    return Factors(down[:, used], up[used])
