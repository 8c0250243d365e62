"""The paper's definitions in plain float64 NumPy; shares no code with the library."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Directions(NamedTuple):
    """Core directions of one matrix; P (in, k), sigma (k,), Q (out, k), rates (k,)."""

    P: np.ndarray
    sigma: np.ndarray
    Q: np.ndarray
    rates: np.ndarray
    order: np.ndarray


def core_directions(
    kernel: np.ndarray, delta: np.ndarray, epsilon: float = 1e-6
) -> Directions:
    """Decompose by full SVD, form P^T dK Q densely, and rank by its diagonal."""
    P, sigma, Qt = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    moved = np.diag(P.T @ delta.astype(np.float64) @ Qt.T)
    rates = np.abs(moved) / (sigma + epsilon)
    return Directions(P, sigma, Qt.T, rates, np.argsort(-rates, kind="stable"))


def spectrum_kernel(
    seed: int, shape: tuple[int, int], sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make a matrix with these singular values; return it with its P and Q."""
    rng = np.random.default_rng(seed)
    P, Q = (np.linalg.qr(rng.normal(size=(n, len(sigma))))[0] for n in shape)
    return (P * sigma) @ Q.T, P, Q


def geometric(k: int, first: float = 10.0, last: float = 1e-2) -> np.ndarray:
    """Return the falling spectrum of a pretrained kernel."""
    return np.geomspace(first, last, k)
