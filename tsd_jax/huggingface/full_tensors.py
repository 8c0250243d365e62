"""Parts trained whole, between parameters and torch's tensors.

embed_tokens/embedding (V, D) -> model.embed_tokens.weight (V, D)
lm_head/kernel (D, V)         -> lm_head.weight (V, D)
layers/norm/scale (L, D)      -> model.layers.0.norm.weight (D,), ...
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullParam, FullSpec
from tsd_jax.huggingface.factors import ModuleName, StackIndex, stack_indices


class TorchTensor(NamedTuple):
    """Say what torch has for a leaf of this name.

    Attributes:
      tensor: its name in the module. axes: of one of them.
      transposed: whether it is stored the other way round.
    """

    tensor: str
    axes: int
    transposed: bool = False


# Linen's names of leaves, and what torch's modules call the same.
TORCH_TENSORS = {
    "kernel": TorchTensor("weight", 2, transposed=True),
    "embedding": TorchTensor("weight", 2),
    "scale": TorchTensor("weight", 1),
    "bias": TorchTensor("bias", 1),
}


class FullTensor(NamedTuple):
    """Hold a trained tensor of torch, or rows of it.

    Attributes:
      module: that owns it, and `tensor`, its name there.
      value: (n, ...), in torch's layout.
      rows: numbers of the first axis that `value` holds; None for all.
    """

    module: str
    tensor: str
    value: np.ndarray
    rows: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Name of the tensor in a checkpoint."""
        return f"{self.module}.{self.tensor}"


def torch_tensor_of(path: str) -> TorchTensor:
    """Look up what torch has for a parameter.

    Raises:
      InputError: the leaf has no name of Linen's own layers.
    """
    name = path.rpartition("/")[2]
    if name not in TORCH_TENSORS:
        raise InputError(
            f"{path}: only leaves named {', '.join(TORCH_TENSORS)} have a place in torch's "
            "files; keep it by save_adapter"
        )
    return TORCH_TENSORS[name]


def full_tensors(
    parts: Mapping[str, FullParam], module_name: ModuleName
) -> dict[str, FullTensor]:
    """Return {tensor: trained values} of all parts, stacked ones layer by layer; float32.

    Args:
      parts: {path: FullParam}, on this host.
      module_name: (path, index of a stacked leaf or None) -> name of the torch module.

    Raises:
      InputError: a part is no leaf of Linen's own layers, or its rows are not rows of
        a tensor of torch.
    """
    tensors = {}
    for path, trained in parts.items():
        value, rows = np.asarray(trained.value, np.float32), torch_rows(trained.part)
        for each in _tensors(path, value, rows, module_name):
            tensors[each.name] = each
    return tensors


def torch_rows(part: FullSpec) -> tuple[int, ...] | None:
    """Return the rows of torch's tensor that train; None for all.

    Raises:
      InputError: what trains is no rows there, or is rows of a stacked leaf.
    """
    kind = torch_tensor_of(part.path)
    if part.rows is None:
        return None
    if len(part.shape) != kind.axes or part.axis != int(kind.transposed):
        raise InputError(
            f"{part.path}: rows along axis {part.axis} of {part.shape} are no rows of "
            "one tensor of torch; keep them by save_adapter"
        )
    return tuple(range(*part.rows))


def _tensors(
    path: str, value: np.ndarray, rows: tuple[int, ...] | None, module_name: ModuleName
) -> list[FullTensor]:
    kind = torch_tensor_of(path)
    batch = value.shape[: value.ndim - kind.axes]
    found = []
    for index in stack_indices(batch) if batch else [None]:
        one = value[() if index is None else index]
        stored = np.ascontiguousarray(one.T if kind.transposed else one)
        found.append(FullTensor(module_name(path, index), kind.tensor, stored, rows))
    return found


def neighbours(whole: Collection[FullSpec], every: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else the modules own that have a parameter trained in full.

    PEFT saves modules, not parameters: a bias goes along with its weight.

    Args:
      whole: what trains whole. every: the tree, flat by path.
    """
    trained = {part.path for part in whole}
    owners = {_owner(part.path) for part in whole if part.rows is None}
    return {
        path: leaf
        for path, leaf in every.items()
        if _owner(path) in owners and path not in trained
    }


def check_modules(whole: Collection[FullSpec], adapted: Collection[str]) -> None:
    """Raise InputError where PEFT's format has no place for a part.

    Args:
      whole: what trains whole. adapted: paths of the adapted kernels.
    """
    owners = {_owner(path) for path in adapted}
    for part in whole:
        path = part.path
        torch_rows(part)
        if "/experts/" in path:
            raise InputError(
                f"{path} trains whole, and transformers fuses the experts of a mixture "
                "into parameters that PEFT cannot save; leave them out"
            )
        if _owner(path) in owners:
            raise InputError(
                f"{path} trains whole and the kernel beside it has an adapter: PEFT "
                "saves a module either way, not both; leave one of them out"
            )


def full_rule(path: str, layers: Mapping[StackIndex, FullTensor]) -> Full:
    """Return the rule that trains what these tensors hold of a parameter.

    Rows are one range, from the first to the last of them.
    """
    rows = [row for each in layers.values() for row in each.rows or ()]
    if not rows:
        return Full(pattern=re.escape(path))
    axis = int(torch_tensor_of(path).transposed)
    return Full(pattern=re.escape(path), rows=(min(rows), max(rows) + 1), axis=axis)


def filled(
    start: np.ndarray, part: FullSpec, layers: Mapping[StackIndex, FullTensor]
) -> np.ndarray:
    """Put tensors of torch into what trains of one parameter.

    Args:
      start: its value so far, `part.value_shape`. part: its description.
      layers: {index of a stacked leaf, or None: tensor}.

    Raises:
      InputError: a tensor has another shape, or rows that do not train.
    """
    value = np.array(start)
    for index, each in layers.items():
        one = each.value.T if torch_tensor_of(part.path).transposed else each.value
        here, one = value[() if index is None else index], np.asarray(one)
        if each.rows is not None:
            here, one = (np.moveaxis(x, part.axis, 0) for x in (here, one))
        if not _fits(here, one, part, each):
            raise InputError(
                f"{part.path}: the adapter holds {each.name} of shape "
                f"{each.value.shape}, which does not fit what the spec trains of it: "
                "make the spec with the adapter's rules, on the base it was made for"
            )
        if each.rows is None:
            here[...] = one
        else:
            first = part.rows[0] if part.rows else 0
            here[np.subtract(each.rows, first)] = one
    return value


def _fits(here: np.ndarray, one: np.ndarray, part: FullSpec, each: FullTensor) -> bool:
    if each.rows is None:
        return part.rows is None and here.shape == one.shape
    first, stop = part.rows or (0, part.shape[part.axis])
    inside = all(first <= row < stop for row in each.rows)
    return inside and here.shape[1:] == one.shape[1:] and len(one) == len(each.rows)


def _owner(path: str) -> str:
    return path.rpartition("/")[0]
