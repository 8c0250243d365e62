"""Full parameters, between trees of parameters and torch's tensors.

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
from tsd_jax.huggingface.names import (
    ModuleName,
    StackIndex,
    axis_indices,
    stack_indices,
)


class TorchTensor(NamedTuple):
    """What torch has for a leaf of one name.

    Attributes:
      tensor: its name in the module.
      axes: of one of them.
      transposed: whether torch stores it transposed.
    """

    tensor: str
    axes: int
    transposed: bool = False

    @property
    def row_axis(self) -> int:
        """The axis of our leaf that is torch's first."""
        return 1 if self.transposed else 0


# {name of a leaf in Linen's layers: what torch's modules have for it}.
TORCH_TENSORS = {
    "kernel": TorchTensor("weight", 2, transposed=True),
    "embedding": TorchTensor("weight", 2),
    "scale": TorchTensor("weight", 1),
    "bias": TorchTensor("bias", 1),
}


class FullTensor(NamedTuple):
    """A trained tensor of torch, or rows of it.

    Attributes:
      module: that owns it.
      tensor: its name in the module.
      value: (n, ...), in torch's layout.
      rows: indices along the first axis that `value` has; None for all.
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
    """Return what torch has for a parameter.

    Args:
      path: of the parameter.

    Raises:
      InputError: the leaf's name is not one of Linen's own layers'.
    """
    name = path.rpartition("/")[2]
    if name not in TORCH_TENSORS:
        raise InputError(
            f"{path}: torch's files can hold only leaves named "
            f"{', '.join(TORCH_TENSORS)}; use save_adapter for others"
        )
    return TORCH_TENSORS[name]


def full_tensors(
    full: Mapping[str, FullParam], module_name: ModuleName
) -> dict[str, FullTensor]:
    """Return {torch tensor: its trained values in float32}, one per stacked matrix.

    Args:
      full: {path: FullParam}, on this host.
      module_name: (path, index of a stacked leaf or None) -> name of the torch module.

    Raises:
      InputError: the leaf's name is not one of Linen's own layers', or its rows are not
        rows of a torch tensor.
    """
    tensors = {}
    for path, trained in full.items():
        value, rows = np.asarray(trained.value, np.float32), torch_rows(trained.part)
        for each in _tensors(path, value, rows, module_name):
            tensors[each.name] = each
    return tensors


def torch_rows(part: FullSpec) -> tuple[int, ...] | None:
    """Return the rows of the torch tensor that train; None for all.

    Args:
      part: the full parameter.

    Raises:
      InputError: what trains is along another axis, or of a stacked leaf.
    """
    kind = torch_tensor_of(part.path)
    if part.rows is None:
        return None
    if len(part.shape) != kind.axes or part.axis != kind.row_axis:
        raise InputError(
            f"{part.path}: rows along axis {part.axis} of {part.shape} are not rows of "
            "one torch tensor; use save_adapter for them"
        )
    return tuple(range(*part.rows))


def _tensors(
    path: str, value: np.ndarray, rows: tuple[int, ...] | None, module_name: ModuleName
) -> list[FullTensor]:
    kind = torch_tensor_of(path)
    batch = value.shape[: value.ndim - kind.axes]
    found = []
    for index in stack_indices(batch) if batch else [None]:
        one = value[axis_indices(index)]
        stored = np.ascontiguousarray(one.T if kind.transposed else one)
        found.append(FullTensor(module_name(path, index), kind.tensor, stored, rows))
    return found


def neighbours(full: Collection[FullSpec], every: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other parameters of modules that have a full parameter.

    PEFT saves modules, not parameters: a bias is saved with its weight.

    Args:
      full: descriptions of the full parameters.
      every: {path: parameter} of the whole tree.
    """
    trained = {part.path for part in full}
    owners = {_owner(part.path) for part in full if part.rows is None}
    return {
        path: leaf
        for path, leaf in every.items()
        if _owner(path) in owners and path not in trained
    }


def check_modules(full: Collection[FullSpec], adapted: Collection[str]) -> None:
    """Check that PEFT's format can hold the full parameters.

    Args:
      full: descriptions of the full parameters.
      adapted: paths of the adapted kernels.

    Raises:
      InputError: it cannot hold one of them.
    """
    owners = {_owner(path) for path in adapted}
    for part in full:
        path = part.path
        torch_rows(part)
        if "/experts/" in path:
            raise InputError(
                f"{path} is trained in full, but transformers fuses the experts of a "
                "mixture into parameters that PEFT cannot save: leave them out"
            )
        if _owner(path) in owners:
            raise InputError(
                f"{path} is trained in full and the kernel beside it has an adapter, "
                "but PEFT saves a module one way or the other: leave one of them out"
            )


def full_rule(path: str, layers: Mapping[StackIndex, FullTensor]) -> Full:
    """Return the rule that trains what these tensors have of a parameter.

    Rows become one range, from the first to the last of them.

    Args:
      path: of the parameter.
      layers: {index of a stacked leaf, or None: tensor}.
    """
    rows = [row for each in layers.values() for row in each.rows or ()]
    if not rows:
        return Full(pattern=re.escape(path))
    axis = torch_tensor_of(path).row_axis
    return Full(pattern=re.escape(path), rows=(min(rows), max(rows) + 1), axis=axis)


def filled(
    start: np.ndarray, part: FullSpec, layers: Mapping[StackIndex, FullTensor]
) -> np.ndarray:
    """Return the value of one full parameter with torch's tensors put into it.

    Args:
      start: its value so far, `part.value_shape`.
      part: its description.
      layers: {index of a stacked leaf, or None: tensor}.

    Raises:
      InputError: a tensor has another shape, or rows that do not train.
    """
    value = np.array(start)
    for index, each in layers.items():
        one = each.value.T if torch_tensor_of(part.path).transposed else each.value
        here, one = value[axis_indices(index)], np.asarray(one)
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
