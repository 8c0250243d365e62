"""DoRA in plain float64 NumPy, and adapters that look trained."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tests.helpers.oracle import geometric, spectrum_kernel
from tests.helpers.trees import trained
from tsd_jax.core.adapter import low_rank_factors


def as_float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def dora(kernel, change, magnitude) -> np.ndarray:
    """Return m o (K + dK) / ||K + dK||, (*batch, in, out)."""
    total = as_float64(kernel) + as_float64(change)
    norms = np.linalg.norm(total, axis=-2, keepdims=True)
    return as_float64(magnitude)[..., None, :] * total / norms


def falling_kernels(spec, seed=0):
    """Return kernels of falling spectra for the matrices of a spec."""
    params = {}
    for kernel in spec.kernels:
        size = (kernel.fan_in, kernel.fan_out)
        stack = [
            spectrum_kernel(seed + n, size, geometric(min(size), 5.0, 0.1))[0]
            for n in range(int(np.prod(kernel.batch_shape)))
        ]
        params[kernel.path] = jnp.asarray(np.reshape(stack, kernel.shape), jnp.float32)
    return params


def trained_dora(spec, params):
    """Return adapters as pre-launch leaves them: magnitudes 10 % off what they were."""
    trainable, directions = trained(3, spec, 0.2)
    rng = np.random.default_rng(4)
    for path, adapter in trainable.adapters.items():
        norms = np.linalg.norm(as_float64(params[path]), axis=-2)
        moved = norms * (1 + 0.1 * rng.normal(size=norms.shape))
        trainable.adapters[path] = adapter.replace(
            magnitude=jnp.asarray(moved, jnp.float32)
        )
    return trainable, directions


def kernel_of(params, trainable, directions, path):
    """Return the dense kernel an adapter stands for, in float64."""
    down, up = low_rank_factors(trainable.adapters[path], directions[path])
    change = as_float64(down) @ as_float64(up)
    return dora(params[path], change, trainable.adapters[path].magnitude)
