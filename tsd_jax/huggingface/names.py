"""Parameter names and layouts: Hugging Face's beside ours.

A `weight` there is (out, in), one per layer and expert; a `kernel` here is (in, out),
stacked over the layers where the model scans them, and over the experts. Modules have
the names of published files, some of which transformers 5 changes on loading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsd_jax.core.errors import InputError
from tsd_jax.core.paths import flatten
from tsd_jax.huggingface.families.family import ModelConfig
from tsd_jax.huggingface.families.registry import FAMILIES, family_of

StackIndex = int | tuple[int, ...] | None
"""Which matrix of a parameter: None where it is not stacked, its number along one
stacked axis (layers or experts), or the numbers along several."""

ParamSlot = tuple[str, StackIndex]
"""Where a torch tensor or module is here: (parameter path, index of its matrix)."""

ModuleName = Callable[[str, Any], str]
"""(kernel path, `StackIndex` of one of its matrices) -> name of the torch module."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The torch tensors of a decoder that have a row for each token."""

TOKEN_AXES = {"embed_tokens/embedding": 0, "lm_head/kernel": 1}
"""{parameter with a row for each token: the axis of the tokens}."""


def abstract_params(
    config: ModelConfig, *, dtype: DTypeLike = jnp.float32, scan_layers: bool = True
) -> dict[str, Any]:
    """Return the tree of a model's parameters as shapes and dtypes, without arrays.

    Args:
      config: of the model.
      dtype: of the parameters.
      scan_layers: stack the layers of the model.
    """
    network = family_of(config).kind.network
    model = network(config, param_dtype=dtype, scan_layers=scan_layers)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def module_name(path: str, index: StackIndex, model_type: str) -> str:
    """Return the name of the torch module that owns the parameter at `path`.

    "layers/self_attn/q_proj/kernel", 3 gives "model.layers.3.self_attn.q_proj", and
    "layers/mlp/experts/up_proj/kernel", (3, 5) "model.layers.3.mlp.experts.5.up_proj".

    Args:
      path: of a leaf of the parameter tree, scanned ("layers/...") or not
        ("layers_3/...").
      index: which matrix of a stacked leaf; None for every other leaf.
      model_type: the family, since some use other names.

    Raises:
      ValueError: if `index` does not have one number for each stacked axis.
    """
    numbers = list(axis_indices(index))
    if len(numbers) != stacked_axes(path):
        raise ValueError(
            f"{path!r}, {index}: the index must have one number for each stacked axis"
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


def name_in_files(module: str, model_type: str) -> str:
    """Return a torch module's name in files, where transformers 5 renames it.

    Args:
      module: as transformers 5 names it, or as in files.
      model_type: the family; one that is unknown renames nothing.
    """
    family = FAMILIES.get(model_type)
    renamed = {} if family is None else family.renamed
    return ".".join(renamed.get(part, part) for part in module.split("."))


def module_paths(params: Mapping[str, Any], model_type: str) -> dict[str, ParamSlot]:
    """Return the inverse of `module_name`, {torch module: (kernel path, index)}.

    Where transformers 5 renames a module on loading, the new name is a key as well.

    Args:
      params: the tree of parameters, arrays or shapes, scanned or not.
      model_type: the family, since some use other names.
    """
    slots: dict[str, ParamSlot] = {}
    for path, leaf in flatten(params).items():
        if not is_transposed(path):
            continue
        for index in stack_indices(leaf.shape[: stacked_axes(path)]):
            for family in (model_type, "llama"):
                slots[module_name(path, index, family)] = (path, index)
    return slots


def tensor_paths(params: Mapping[str, Any], model_type: str) -> dict[str, ParamSlot]:
    """Return the inverse of `tensor_names`, {torch tensor: (parameter path, index)}.

    Args:
      params: the tree of parameters, arrays or shapes, scanned or not.
      model_type: the family, since some use other names.
    """
    slots: dict[str, ParamSlot] = {}
    for path, leaf in flatten(params).items():
        indices = stack_indices(leaf.shape[: stacked_axes(path)])
        names = tensor_names(path, leaf.shape, model_type)
        slots |= {n: (path, index) for n, index in zip(names, indices, strict=True)}
    return slots


def stack_indices(batch: tuple[int, ...]) -> list[StackIndex]:
    """Return the index of every matrix of a stack, in row-major order.

    Args:
      batch: the stacked axes; () gives [None].
    """
    if len(batch) == 1:
        return list(range(batch[0]))
    return [index or None for index in np.ndindex(batch)]


def axis_indices(index: StackIndex) -> tuple[int, ...]:
    """Return a stack index as a tuple, which selects that matrix of an array."""
    if index is None:
        return ()
    return index if isinstance(index, tuple) else (index,)


def is_stacked(path: str) -> bool:
    """Return whether the first axis of the leaf at `path` is the layers."""
    return path.startswith("layers/")


def stacked_axes(path: str) -> int:
    """Return how many first axes of the leaf at `path` stack layers and experts."""
    layers = 1 if is_stacked(path) else 0
    experts = 1 if "/experts/" in path else 0
    return layers + experts


def is_transposed(path: str) -> bool:
    """Return whether torch stores the leaf at `path` transposed."""
    return path.endswith("/kernel")


def tensor_names(path: str, shape: tuple[int, ...], model_type: str) -> list[str]:
    """Return the torch tensors of a parameter, in the order of its stacked axes.

    Args:
      path: of the parameter.
      shape: of the parameter.
      model_type: the family, since some use other names.
    """
    tensor = "bias" if path.endswith("/bias") else "weight"
    return [
        f"{module_name(path, index, model_type)}.{tensor}"
        for index in stack_indices(shape[: stacked_axes(path)])
    ]


def tensor_shapes(
    params: Mapping[str, Any], model_type: str
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every torch tensor of a parameter tree.

    Args:
      params: the tree of parameters, arrays or shapes.
      model_type: the family, since some use other names.
    """
    shapes = {}
    for path, leaf in flatten(params).items():
        shape = leaf.shape[stacked_axes(path) :]
        shape = shape[::-1] if is_transposed(path) else shape
        shapes |= dict.fromkeys(tensor_names(path, leaf.shape, model_type), shape)
    return shapes


def canonical_names(names: Iterable[str], model_type: str) -> dict[str, str]:
    """Return {name of a tensor as `tensor_names` has it: its name in a file}.

    Files of a class without a head lack the prefix, and old ones name norms otherwise.

    Args:
      names: of all tensors in a checkpoint.
      model_type: the family.
    """
    family = FAMILIES[model_type]
    names = list(names)
    bare = not any(n.startswith(f"{family.prefix}.") for n in names)
    found = {}
    for name in names:
        first, _, _ = name.partition(".")
        prefix = f"{family.prefix}." if bare and first not in family.bare else ""
        new = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", prefix + name)
        found[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", new)] = name
    return found


def head_paths(params: Iterable[str], model_type: str) -> list[str]:
    """Return those of the parameter paths that belong to the head, if there is one."""
    pattern = FAMILIES[model_type].head
    return [path for path in params if re.fullmatch(pattern, path)]


def to_huggingface(
    params: Mapping[str, Any], config: ModelConfig
) -> dict[str, np.ndarray]:
    """Return a model's parameters under Hugging Face's names, in its layouts.

    Args:
      params: the tree of parameters, scanned or not, without adapters.
      config: of the model.

    Returns:
      Contiguous arrays {torch tensor: values}, in the parameters' dtypes.

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


def _check_tree(flat: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError unless paths and shapes are those of the model."""
    for path in sorted(flat.keys() | wanted.keys()):
        here = flat[path].shape if path in flat else "nothing"
        there = wanted[path].shape if path in wanted else "nothing"
        if here != there:
            raise InputError(
                f"parameter {path!r}: found {here}, but this model has {there}: give "
                "its plain parameters (merge adapters first)"
            )
