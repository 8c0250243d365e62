"""Devices that compute in float64, and the hosts' CPUs in place of the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from tsd_jax.core.errors import InputError


@functools.cache
def has_float64(platform: str) -> bool:
    """Return whether a platform's devices compute and decompose in float64.

    Apple's and most accelerators made for neural networks do not.

    Args:
      platform: name of the platform, as `jax.Device.platform` gives it.
    """
    return platform in ("cpu", "gpu", "cuda", "rocm")


def host_device() -> Any:
    """Return this process's CPU as a device.

    Raises:
      InputError: JAX was told to use accelerators only.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise InputError(
            "devices without float64 leave decompositions to the host's CPU, which "
            f"JAX_PLATFORMS={jax.config.jax_platforms!r} leaves out: add ',cpu' to it"  # pyright: ignore[reportAttributeAccessIssue]
        ) from None


def run_on_hosts(run: Callable[..., Any], *chunks: Any) -> Any:
    """Run a chunk's matrices on the CPUs of the hosts whose devices hold them.

    For devices without float64. Every process computes its own devices' matrices;
    nothing is exchanged, and nothing is compiled for the devices.

    Args:
      run: arrays (k, ...) of some matrices, on the CPU -> a tree of arrays (k, ...).
      chunks: trees of arrays (width, ...), sharded along the first axis.
    """
    cpu = host_device()
    arrays, tree = jax.tree.flatten(chunks)
    results = []
    with jax.default_device(cpu):
        for shards in zip(*(x.addressable_shards for x in arrays), strict=True):
            local = [
                jax.device_put(jax.device_get(shard.data), cpu) for shard in shards
            ]
            done = run(*jax.tree.unflatten(tree, local))
            results.append((shards[0].device, done))
    sharding, width = arrays[0].sharding, arrays[0].shape[0]
    single = not isinstance(sharding, NamedSharding)

    def joined(*leaves: jax.Array) -> jax.Array:
        pieces = [
            jax.device_put(jax.device_get(leaf), device)
            for (device, _), leaf in zip(results, leaves, strict=True)
        ]
        if single:
            return pieces[0]
        shape = (width, *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return jax.tree.map(joined, *(result for _, result in results))
