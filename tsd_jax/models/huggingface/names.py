"""Parameter names and layouts: Hugging Face's beside ours.

A `weight` there is (out, in), one per layer; a `kernel` here is (in, out), stacked over
the layers where the model scans them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError
from tsd_jax.models.llama import Llama, LlamaConfig


def abstract_params(
    config: LlamaConfig, *, dtype: DTypeLike = jnp.float32, scan_layers: bool = True
) -> dict[str, Any]:
    """Give the shapes and dtypes of a Llama's parameters, and no arrays."""
    model = Llama(config, param_dtype=dtype, scan_layers=scan_layers)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def module_name(path: str, layer: int | None = None) -> str:
    """Name the torch module that owns the parameter at `path`.

    "layers/self_attn/q_proj/kernel", 3 gives "model.layers.3.self_attn.q_proj".

    Args:
      path: of a leaf of the parameter tree, scanned ("layers/...") or not
        ("layers_3/...").
      layer: which one of a stacked leaf; None for every other leaf.
    """
    first, *inner = path.split("/")[:-1]
    numbered = re.fullmatch(r"layers_(\d+)", first)
    if (first == "layers") != (layer is not None):
        raise ValueError(f"{path!r}, layer {layer}: stacked leaves alone have layers")
    if first == "lm_head":
        return first
    if numbered:
        first, layer = "layers", int(numbered[1])
    number = [] if layer is None else [str(layer)]
    return ".".join(["model", first, *number, *inner])


def module_places(params: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Invert `module_name` for every kernel: {torch module: (kernel path, layer)}.

    Args:
      params: the tree of parameters, arrays or shapes, scanned or not.
    """
    return {
        module_name(path, layer): (path, layer)
        for path, leaf in flatten(params).items()
        if is_transposed(path)
        for layer in (range(leaf.shape[0]) if is_stacked(path) else [None])
    }


def is_stacked(path: str) -> bool:
    """Tell whether the leaf at `path` has the layers as its first axis."""
    return path.startswith("layers/")


def is_transposed(path: str) -> bool:
    """Tell whether the leaf at `path` is stored the other way round."""
    return path.endswith("/kernel")


def tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    """Name the tensors that make up a parameter: one, or one a layer."""
    layers = range(shape[0]) if is_stacked(path) else [None]
    kind = "bias" if path.endswith("/bias") else "weight"
    return [f"{module_name(path, layer)}.{kind}" for layer in layers]


def tensor_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give name and shape of every tensor that makes up `params`, flat by path."""
    shapes = {}
    for path, leaf in params.items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        shape = shape[::-1] if is_transposed(path) else shape
        shapes |= dict.fromkeys(tensor_names(path, leaf.shape), shape)
    return shapes


def to_huggingface(
    params: Mapping[str, Any], config: LlamaConfig
) -> dict[str, np.ndarray]:
    """Give the parameters their Hugging Face names and layouts.

    Args:
      params: the tree of parameters, scanned or not, without adapters.
      config: of the model.

    Returns:
      Contiguous arrays under their tensors' names, in the parameters' dtypes.

    Raises:
      InputError: if the tree is not that of a Llama with this config.
    """
    flat = flatten(params)
    _check_tree(flat, flatten(abstract_params(config, scan_layers="layers" in params)))
    tensors = {}
    for path, leaf in flat.items():
        array = np.asarray(leaf)
        layers = array if is_stacked(path) else array[None]
        for name, layer in zip(tensor_names(path, array.shape), layers, strict=True):
            stored = layer.T if is_transposed(path) else layer
            tensors[name] = np.ascontiguousarray(stored)
    return tensors


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested dicts to one, by "/"-joined paths."""
    return traverse_util.flatten_dict(tree, sep="/")


def _check_tree(flat: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare paths and shapes with the model's own."""
    for path in sorted(flat.keys() | wanted.keys()):
        here = flat[path].shape if path in flat else "nothing"
        there = wanted[path].shape if path in wanted else "nothing"
        if here != there:
            raise InputError(
                f"parameter {path!r}: found {here}, but this Llama has {there}: give "
                "its plain parameters (merge adapters first)"
            )
