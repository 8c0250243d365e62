"""Parameter names and layouts: Hugging Face's beside ours.

A `weight` there is (out, in), one per layer and expert; a `kernel` here is (in, out),
stacked over the layers where the model scans them, and over the experts. Modules have
the names they have in published files, some of which transformers 5 changes on loading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families.decoders import FAMILIES
from tsd_jax.huggingface.families.family import ModelConfig


def abstract_params(
    config: ModelConfig, *, dtype: DTypeLike = jnp.float32, scan_layers: bool = True
) -> dict[str, Any]:
    """Return the shapes and dtypes of a model's parameters, and no arrays."""
    network = FAMILIES[config.model_type].kind.network
    model = network(config, param_dtype=dtype, scan_layers=scan_layers)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def module_name(
    path: str,
    index: int | tuple[int, ...] | None = None,
    model_type: str = "llama",
) -> str:
    """Name the torch module that owns the parameter at `path`.

    "layers/self_attn/q_proj/kernel", 3 gives "model.layers.3.self_attn.q_proj", and
    "layers/mlp/experts/up_proj/kernel", (3, 5) "model.layers.3.mlp.experts.5.up_proj".

    Args:
      path: of a leaf of the parameter tree, scanned ("layers/...") or not
        ("layers_3/...").
      index: which one of a stacked leaf, an integer for each stacked axis; None for
        every other leaf.
      model_type: the family, for some have other names.
    """
    numbers = list(index) if isinstance(index, tuple) else [index]
    numbers = [number for number in numbers if number is not None]
    if len(numbers) != stacked_axes(path):
        raise ValueError(
            f"{path!r}, {index}: stacked leaves alone have an index for each axis"
        )
    family = FAMILIES[model_type]
    first, *_ = path.split("/")
    names = [] if first in family.bare else [family.prefix]
    for part in path.split("/")[:-1]:
        layer = re.fullmatch(r"layers_(\d+)", part)
        if layer:
            names += [family.layers, layer[1]]
        elif part == "layers":
            names += [family.layers, str(numbers.pop(0))]
        elif part == "experts":
            names += [part, str(numbers.pop(0))]
        else:
            names.append(family.renamed.get(part, part))
    return ".".join(names)


def module_paths(
    params: Mapping[str, Any], model_type: str = "llama"
) -> dict[str, tuple[str, int | tuple[int, ...] | None]]:
    """Invert `module_name` for every kernel: {torch module: (kernel path, index)}.

    Where transformers 5 renames a module on loading, that name is there as well.

    Args:
      params: the tree of parameters, arrays or shapes, scanned or not.
      model_type: the family, for some have other names.
    """
    places = {}
    for path, leaf in flatten(params).items():
        if not is_transposed(path):
            continue
        for numbers in np.ndindex(leaf.shape[: stacked_axes(path)]):
            index = numbers if len(numbers) > 1 else numbers[0] if numbers else None
            for family in (model_type, "llama"):
                places[module_name(path, index, family)] = (path, index)
    return places


def tensor_paths(
    params: Mapping[str, Any], model_type: str = "llama"
) -> dict[str, tuple[str, int | tuple[int, ...] | None]]:
    """Invert `tensor_names` for every parameter: {torch tensor: (path, index)}.

    Args:
      params: the tree of parameters, arrays or shapes, scanned or not.
      model_type: the family, for some have other names.
    """
    places = {}
    for path, leaf in flatten(params).items():
        numbers = list(np.ndindex(leaf.shape[: stacked_axes(path)]))
        names = tensor_names(path, leaf.shape, model_type)
        for name, index in zip(names, numbers, strict=True):
            short = index if len(index) > 1 else index[0] if index else None
            places[name] = (path, short)
    return places


def is_stacked(path: str) -> bool:
    """Return whether the leaf at `path` has the layers as its first axis."""
    return path.startswith("layers/")


def stacked_axes(path: str) -> int:
    """Count the first axes of the leaf at `path` that stack layers and experts."""
    return is_stacked(path) + ("/experts/" in path)


def is_transposed(path: str) -> bool:
    """Return whether the leaf at `path` is stored the other way round."""
    return path.endswith("/kernel")


def tensor_names(
    path: str, shape: tuple[int, ...], model_type: str = "llama"
) -> list[str]:
    """Name the tensors that make up a parameter, in the order of its stacked axes."""
    kind = "bias" if path.endswith("/bias") else "weight"
    return [
        f"{module_name(path, index or None, model_type)}.{kind}"
        for index in np.ndindex(shape[: stacked_axes(path)])
    ]


def tensor_shapes(
    params: Mapping[str, Any], model_type: str = "llama"
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that makes up `params`, flat by path."""
    shapes = {}
    for path, leaf in params.items():
        shape = leaf.shape[stacked_axes(path) :]
        shape = shape[::-1] if is_transposed(path) else shape
        shapes |= dict.fromkeys(tensor_names(path, leaf.shape, model_type), shape)
    return shapes


def canonical_names(names: Iterable[str], model_type: str) -> dict[str, str]:
    """Return {the name a tensor has here: its name in a file}.

    Files of a class without a head lack the prefix, and old ones name norms otherwise.
    """
    family = FAMILIES[model_type]
    names = list(names)
    bare = family.headless and not any(n.startswith(f"{family.prefix}.") for n in names)
    found = {}
    for name in names:
        first, _, _ = name.partition(".")
        prefix = f"{family.prefix}." if bare and first not in family.bare else ""
        new = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", prefix + name)
        found[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", new)] = name
    return found


def head_paths(params: Mapping[str, Any], model_type: str) -> list[str]:
    """Return the paths of `params`, flat, that are of the head, if there is one."""
    pattern = FAMILIES[model_type].head
    return [path for path in params if re.fullmatch(pattern, path)]


def to_huggingface(
    params: Mapping[str, Any], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Return the parameters their Hugging Face names and layouts.

    Args:
      params: the tree of parameters, scanned or not, without adapters.
      config: of the model.

    Returns:
      Contiguous arrays under their tensors' names, in the parameters' dtypes.

    Raises:
      InputError: if the tree is not that of a model with this config.
    """
    flat = flatten(params)
    _check_tree(flat, flatten(abstract_params(config, scan_layers="layers" in params)))
    tensors = {}
    for path, leaf in flat.items():
        array = np.asarray(leaf)
        matrices = array.reshape(-1, *array.shape[stacked_axes(path) :])
        owners = tensor_names(path, array.shape, config.model_type)
        for name, matrix in zip(owners, matrices, strict=True):
            stored = matrix.T if is_transposed(path) else matrix
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
                f"parameter {path!r}: found {here}, but this model has {there}: give "
                "its plain parameters (merge adapters first)"
            )
