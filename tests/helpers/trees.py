"""Small specs, and adapters filled with numbers instead of zeros."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core.adapter import Adapter, Directions, Trainable
from tsd_jax.core.initialization import init_kernel
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import Method, get_method
from tsd_jax.core.spec import KernelSpec, Rule, Spec, build_spec

STACKED = Layout((0,), (1,), (2,), lifted=(0,))


def method_of(name: str) -> Method:
    """Read "tsd" or "tsd+keep"."""
    return get_method(name.removesuffix("+keep"), keep=name.endswith("+keep"))


def small_spec(
    method: str,
    *,
    rank: int = 2,
    directions: int = 4,
    alpha: float = 3.0,
    shape: tuple[int, ...] | None = None,
    layout: Layout | None = None,
    auto: bool = False,
    dora: bool = False,
) -> Spec:
    """Describe a (6, 7) kernel "k" and a stack of three, or one of your own."""
    shapes: dict[str, tuple[int, ...]] = {"k": (6, 7), "stack": (3, 6, 7)}
    layouts = {"k": Layout(), "stack": STACKED}
    if shape is not None:
        shapes, layouts = {"k": shape}, {"k": layout or Layout()}
    rule = Rule(
        pattern=".*",
        rank=rank,
        alpha=alpha,
        directions=directions,
        auto_directions=auto,
        dora=dora,
    )
    matched = dict.fromkeys(shapes, rule)
    return build_spec(shapes, layouts, matched, method_of(method))


def filled(seed: int, shapes: Any, scale: float = 1.0) -> Any:
    """Fill a tree of shapes with normal numbers, without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes
    )


def zeros(shapes: Any) -> Any:
    """Fill a tree of shapes with zeros, without compiling anything."""
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)


def pair_shapes(kernel: KernelSpec) -> tuple[Adapter, Directions]:
    """Return the shapes of what lies beside one kernel."""
    return jax.eval_shape(
        lambda base: init_kernel(jax.random.key(0), kernel, jnp.dtype("float32"), base),
        jax.ShapeDtypeStruct(kernel.shape, jnp.float32),
    )


def random_pair(
    seed: int, kernel: KernelSpec, scale: float = 1.0
) -> tuple[Adapter, Directions]:
    """Fill everything beside one kernel, frozen factors too, with random numbers."""
    return filled(seed, pair_shapes(kernel), scale)


def random_all(
    seed: int, spec: Spec, scale: float = 1.0
) -> tuple[Trainable, dict[str, Directions]]:
    """Fill the adapters and directions of a whole spec."""
    pairs = {
        kernel.path: random_pair(seed + n, kernel, scale)
        for n, kernel in enumerate(spec.kernels)
    }
    trainable = Trainable(adapters={path: pair[0] for path, pair in pairs.items()})
    return trainable, {path: pair[1] for path, pair in pairs.items()}


def trained(seed: int, spec: Spec, scale: float = 0.1):
    """Fill A and B alone: what stands before launch, gains and directions zero."""
    trainable, directions = random_all(seed, spec, scale)
    return without_gains(trainable), zeros(directions)


def without_gains(trainable: Trainable) -> Trainable:
    """Return what trains with gains of zero, as they are before launch."""
    adapters = {
        path: adapter.replace(gain=zeros(adapter.gain))
        for path, adapter in trainable.adapters.items()
    }
    return trainable.replace(adapters=adapters)


def assert_leaves_close(found: Any, expected: Any, *, atol: float) -> None:
    """Compare two trees leaf by leaf; `atol` is a share of a leaf's largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        scale = np.abs(theirs).max()
        assert scale > 1e-3  # every leaf counts
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol * scale)
