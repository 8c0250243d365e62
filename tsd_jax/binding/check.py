"""Whether a bound model computes what the merged model computes, for any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.binding.follow import inner_programs
from tsd_jax.core import paths
from tsd_jax.core.adapter import (
    Adapter,
    Directions,
    Trainable,
    low_rank_factors,
)
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.quantization import dequantize
from tsd_jax.core.spec import Spec

Pair = tuple[Trainable, dict[str, Directions]]


class Ways(NamedTuple):
    """The three models that are compared, each a function to a list of arrays.

    Attributes:
      base: inputs -> outputs.
      bound: (inputs, trainable, directions) -> outputs.
      merged: (inputs, trainable, directions) -> outputs.
    """

    base: Callable[[Any], list[jax.Array]]
    bound: Callable[..., list[jax.Array]]
    merged: Callable[..., list[jax.Array]]


class Outputs(NamedTuple):
    """What they return: the base, adapters that add nothing, and random ones."""

    base: list[jax.Array]
    start: list[jax.Array]
    bound: list[jax.Array]
    merged: list[jax.Array]


def floats(outputs: Any) -> list[jax.Array]:
    """Return the float arrays among a model's outputs.

    Args:
      outputs: a tree.
    """
    return [
        leaf
        for leaf in jax.tree.leaves(outputs)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def compare(
    ways: Ways,
    inputs: Any,
    params: Callable[[Any], Mapping[str, Any]],
    spec: Spec,
    key: jax.Array,
) -> None:
    """Raise InputError unless the bound model is the merged one and starts as the base.

    All passes are one program, so that they are compiled together.

    Args:
      ways: the models.
      inputs: arrays that they take, parameters among them.
      params: inputs -> the base's tree.
      spec: of `make_spec`.
      key: for random adapters.

    Raises:
      InputError: outputs differ by more than rounding; the line names the kernel that
        does most of it.
    """
    outputs, (start, drawn), limit = _outputs(ways, inputs, params, spec, key)
    base, merged = outputs.base, outputs.merged
    if not base:
        raise InputError("the model returns no float arrays: nothing can be compared")
    difference = _distance(outputs.start, base, base)
    if not difference <= limit:
        raise InputError(
            f"with adapters that add nothing the model differs from the base by "
            f"{difference:.2g} of its outputs: it is not the same at each call "
            "(dropout, random numbers), or looks at its parameters itself"
        )
    effect = _distance(merged, base, base)
    if not _distance(outputs.bound, merged, merged) <= limit * max(1.0, effect):
        path, difference = _worst(ways, inputs, start, drawn)
        raise InputError(
            f"{path}: the model with its adapter differs from the merged one by "
            f"{difference:.2g} of its outputs; leave it out of the rules, or contract "
            "it by this library's einsum"
        )
    if spec.kernels and effect == 0:
        raise InputError(
            "the adapted kernels do not change the outputs of this call: check another"
        )


def _outputs(
    ways: Ways,
    inputs: Any,
    params: Callable[[Any], Mapping[str, Any]],
    spec: Spec,
    key: jax.Array,
) -> tuple[Outputs, tuple[Pair, Pair], float]:
    """Return all outputs, the two sets of adapters, and how far they may differ."""

    def run(inputs: Any, key: jax.Array) -> tuple[Outputs, tuple[Pair, Pair]]:
        base = params(inputs)
        start = init(key, spec, params=base)
        drawn = _drawn(start, base, key)
        outputs = Outputs(
            base=ways.base(inputs),
            start=ways.bound(inputs, *start),
            bound=ways.bound(inputs, *drawn),
            merged=ways.merged(inputs, *drawn),
        )
        return outputs, (start, drawn)

    traced = jax.jit(run).trace(inputs, key)
    # It runs once: on a CPU, where it can be told, it is compiled fast, not to be fast.
    quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
    options = quick if jax.default_backend() == "cpu" else None
    program = traced.lower().compile(compiler_options=options)
    limit = max(1e-3, 16 * _epsilon(traced.jaxpr.jaxpr))
    return *program(inputs, key), limit


def _epsilon(program: Any) -> float:
    """Return the relative rounding error of the narrowest type of a program."""
    found = [jnp.finfo(jnp.float32).eps]

    def walk(program: Any) -> None:
        for equation in program.eqns:
            types = [
                getattr(v.aval, "dtype", None)
                for v in (*equation.invars, *equation.outvars)
            ]
            floating = [t for t in types if t and jnp.issubdtype(t, jnp.floating)]
            found.extend(jnp.finfo(t).eps for t in floating)
            for inner in inner_programs(equation):
                walk(inner)

    walk(program)
    return float(max(found))


def _distance(
    these: list[jax.Array], those: list[jax.Array], scale: list[jax.Array]
) -> float:
    """Return the root mean square of a difference, relative to that of `scale`."""
    wide = [
        np.concatenate([np.ravel(np.asarray(y, np.float64)) for y in ys])
        for ys in (these, those, scale)
    ]
    size = np.sqrt(np.mean(wide[2] ** 2))
    return float(np.sqrt(np.mean((wide[0] - wide[1]) ** 2)) / (size or 1.0))


def _drawn(start: Pair, params: Mapping[str, Any], key: jax.Array) -> Pair:
    """Return random adapters, dK half as large as the kernel."""
    trainable, directions = start
    base = paths.select(params, tuple(trainable.adapters))
    adapters, frozen = {}, {}
    for number, (path, adapter) in enumerate(trainable.adapters.items()):
        own = jax.random.fold_in(key, number)
        pair = _random(own, adapter, directions[path])
        down, up = low_rank_factors(*pair)
        size = jnp.sqrt(jnp.mean(jnp.matmul(down, up) ** 2))
        kernel = dequantize(base[path]).astype(down.dtype)
        share = 0.5 * jnp.sqrt(jnp.mean(kernel**2)) / size
        adapters[path], frozen[path] = _scaled(*pair, share)
    return trainable.replace(adapters=adapters), frozen


def _random(
    key: jax.Array, adapter: Adapter, directions: Directions
) -> tuple[Adapter, Directions]:
    """Fill all leaves with random numbers; magnitudes are moved a little."""
    leaves, tree = jax.tree.flatten((adapter.replace(magnitude=None), directions))
    keys = jax.random.split(key, len(leaves) + 1)
    drawn = [
        jax.random.normal(one, leaf.shape, leaf.dtype)
        for one, leaf in zip(keys[1:], leaves, strict=True)
    ]
    random, frozen = tree.unflatten(drawn)
    moved = adapter.magnitude
    if moved is not None:
        moved = moved * jax.random.uniform(keys[0], moved.shape, moved.dtype, 0.8, 1.2)
    return random.replace(magnitude=moved), frozen


def _scaled(
    adapter: Adapter, directions: Directions, share: jax.Array
) -> tuple[Adapter, Directions]:
    """Return the pair whose dK is `share` times as large."""

    def times(leaf: Any) -> Any:
        return None if leaf is None else share * leaf

    scaled = adapter.replace(b=times(adapter.b), gain=times(adapter.gain))
    return scaled, directions.replace(offset=times(directions.offset))


def _worst(ways: Ways, inputs: Any, start: Pair, drawn: Pair) -> tuple[str, float]:
    """Try each kernel alone; return the one that differs most, and how much."""
    found, each_way = {}, [jax.jit(way) for way in ways[1:]]
    for path in drawn[0].adapters:
        adapters = {**start[0].adapters, path: drawn[0].adapters[path]}
        trainable = start[0].replace(adapters=adapters)
        directions = {**start[1], path: drawn[1][path]}
        bound, merged = (way(inputs, trainable, directions) for way in each_way)
        found[path] = _distance(bound, merged, merged)
    return max(found.items(), key=lambda pair: pair[1])
