"""Write adapters in the format of Hugging Face PEFT, exactly.

What a method adds to a kernel is one ordinary LoRA, whatever the method:

    dK = gamma A B + L diag(g + o) R^T = down @ up

PEFT computes `y + (lora_alpha / r) lora_B(lora_A(x))` with torch's transposed weights,
so lora_A = down^T and lora_B = up^T with lora_alpha = r, and nothing is rounded. DoRA's
m is its lora_magnitude_vector, over the norms of the same K + dK.

Full parameters become its `modules_to_save`, whole modules under their own names, and
rows of an embedding its `trainable_token_indices`: the trained rows alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Directions, Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.huggingface import factors as low_rank
from tsd_jax.huggingface.casts import cast
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.huggingface.full_tensors import (
    FullTensor,
    check_modules,
    full_tensors,
    neighbours,
)
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from tsd_jax.huggingface.names import EMBEDDING, HEAD, ModuleName, stack_indices
from tsd_jax.huggingface.peft import experts
from tsd_jax.huggingface.peft.config import adapter_config
from tsd_jax.huggingface.peft.names import (
    PREFIX,
    TRAINED_ROWS,
    embedding_factor_name,
    factor_name,
    is_embedding,
    magnitude_name,
)
from tsd_jax.storage.atomic import write_json
from tsd_jax.storage.tensors import write_tensors

_log = logging.getLogger(__name__)

INFER = "infer"
"""The task type of `to_peft` that module names tell."""


@dataclass(frozen=True)
class PeftExport:
    """What was written, and what cutting ranks cost.

    Attributes:
      rank: of the adapter, the largest of its modules. Servers limit it (vLLM:
        `max_lora_rank`, 16 by default).
      errors: {torch module: ||dK - dK'||_F / ||dK||_F}, of those that `max_rank` cut.
      error: the same of all modules taken as one matrix; 0 where nothing was cut.
      dora: whether it is DoRA, which vLLM does not serve.
    """

    rank: int
    errors: Mapping[str, float]
    error: float
    dora: bool = False


def to_peft(
    folder: str | Path,
    trainable: Trainable,
    directions: Mapping[str, Directions],
    module_name: ModuleName,
    *,
    base_model: str,
    params: Mapping[str, Any] | None = None,
    max_rank: int | None = None,
    task_type: str | None = INFER,
    tied: bool | None = None,
    revision: str | None = None,
) -> PeftExport:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT loads them.

    Columns of L that are zero (before launch, all of them), or have no coordinate
    along them, are left out.

    Args:
      folder: created if it does not exist.
      trainable: on this host.
      directions: {kernel path: Directions}.
      module_name: (path, index of a stacked leaf or None) -> name of the torch module.
      base_model: name or path of the base, for the config.
      params: the base's parameter tree. With it, modules are named by their last part
        ("q_proj") where all of that name are adapted. It also provides the rest of
        modules trained in part, such as a frozen bias, which PEFT saves along.
      max_rank: cut modules of a higher rank to this one, by the SVD of their factors;
        the cost is returned and logged. Without it the export is exact. With DoRA the
        magnitudes stay, and the cost is that of dK before columns are scaled.
      task_type: of PEFT, such as "CAUSAL_LM" or "SEQ_CLS"; by default that of the
        family with such module names, and None for models of no family.
      tied: whether the base's head is its embedding; by default as `params` has it.
      revision: branch, tag or commit of the base on the hub, for the config.

    Raises:
      InputError: there is no adapter, only some kernels have DoRA, `max_rank` is below
        1, the folder cannot be written, or PEFT's format cannot hold a full parameter:
        one beside an adapted kernel, or rows along another than a tensor's first axis.
    """
    factors = low_rank.module_factors(trainable.adapters, directions, module_name)
    tensors = _saved_tensors(trainable, module_name, params)
    return write_adapter(
        folder,
        factors,
        _targets(trainable.adapters, module_name, params),
        base_model=base_model,
        max_rank=max_rank,
        tensors=tensors,
        tied=_is_tied(tensors, params) if tied is None else tied,
        task_type=_task({*factors}) if task_type == INFER else task_type,
        revision=revision,
    )


def _task(modules: set[str]) -> str | None:
    """Return PEFT's name of what models with such modules do; None if unknown."""
    tasks = {family.prefix: family.kind.peft_task for family in FAMILIES.values()}
    found = {tasks.get(name.partition(".")[0]) for name in modules} - {None}
    return found.pop() if len(found) == 1 else None


def write_adapter(
    folder: str | Path,
    factors: Mapping[str, Factors],
    targets: set[str],
    *,
    base_model: str,
    max_rank: int | None = None,
    tensors: Mapping[str, FullTensor] = MappingProxyType({}),
    tied: bool = False,
    task_type: str | None,
    revision: str | None = None,
) -> PeftExport:
    """Write {torch module: factors} as a PEFT adapter; see `to_peft`.

    Args:
      folder: created if it does not exist.
      factors: {torch module: dK of it, with its scale}.
      targets: of `target_modules`.
      base_model: name or path of the base, for the config.
      max_rank: as in `to_peft`.
      tensors: {torch tensor: its trained values}.
      tied: whether the base's head is its embedding.
      task_type: of PEFT.
      revision: as in `to_peft`.

    Raises:
      InputError: as `to_peft`.
    """
    for name, each in factors.items():
        low_rank.require_finite(each, name)
        if f"{name}.weight" in tensors:
            raise InputError(
                f"{name} is adapted and has trained or grown rows, too, and PEFT saves "
                "a module one way or the other: export it merged"
            )
    for name, each in tensors.items():
        cast(each.value, each.value.dtype, name)
    dora = _uses_dora(factors)
    cut: dict[str, tuple[float, float]] = {}
    if max_rank is not None:
        small = {n: low_rank.compress(f, max_rank) for n, f in factors.items()}
        cut = {name: (each.lost, each.norm) for name, each in small.items()}
        factors = {name: each.factors for name, each in small.items()}
    given = {*factors}
    factors, rank = experts.complete(factors)
    ranks = {name: each.rank for name, each in factors.items()}
    largest = max(ranks.values())
    config = adapter_config(
        ranks,
        targets | (factors.keys() - given),
        tensors,
        default_rank=rank or largest,
        base_model=base_model,
        revision=revision,
        dora=dora,
        task_type=task_type,
    )
    _write_files(Path(folder), config, factors, tensors, tied)
    return _report(cut, PeftExport(largest, {}, 0.0, dora), max_rank)


def _is_tied(
    tensors: Mapping[str, FullTensor], params: Mapping[str, Any] | None
) -> bool:
    """Return whether the base's head is its embedding, where that matters."""
    embedding = tensors.get(EMBEDDING)
    if embedding is None or embedding.rows is not None:
        return False
    if params is None:
        raise InputError(
            f"{EMBEDDING} is trained in full, and whether the head is tied to it is "
            "not known: give params, the base's parameter tree, or tied"
        )
    return "lm_head" not in params


def _report(
    cut: Mapping[str, tuple[float, float]], export: PeftExport, max_rank: int | None
) -> PeftExport:
    """Return the export with the errors of its cut modules, logging each of them."""
    if not cut:
        return export
    errors = {name: low_rank.relative(*pair) for name, pair in cut.items()}
    errors = {name: error for name, error in errors.items() if error}
    for name, error in errors.items():
        _log.info("%s: cut to rank %d, relative error %.3g", name, max_rank, error)
    return replace(export, errors=errors, error=low_rank.total(cut))


def _write_files(
    folder: Path,
    config: Mapping[str, Any],
    factors: Mapping[str, Factors],
    tensors: Mapping[str, FullTensor],
    tied: bool,
) -> None:
    """Write both files of an adapter."""
    stored = _factor_tensors(factors) | _full_values(tensors)
    if tied and EMBEDDING in tensors and tensors[EMBEDDING].rows is None:
        config = {**config, "ensure_weight_tying": True}
        stored[PREFIX + HEAD] = tensors[EMBEDDING].value
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / ADAPTER_WEIGHTS_FILE, stored, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG_FILE, config)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror})") from error


def _uses_dora(factors: Mapping[str, Factors]) -> bool:
    """Return whether modules have DoRA; PEFT has one setting for all of them."""
    with_dora = {name for name, each in factors.items() if each.magnitude is not None}
    without = factors.keys() - with_dora
    if with_dora and without:
        raise InputError(
            f"{min(with_dora)} has DoRA and {min(without)} does not, but PEFT has one "
            "use_dora for all modules: adapt all kernels alike, or export them merged"
        )
    stacked = with_dora & experts.as_parameters(with_dora)
    if stacked:
        raise InputError(
            f"{min(stacked)} has DoRA, which PEFT does not support for experts and "
            "routers: leave them out of DoRA's rules, or export them merged"
        )
    return bool(with_dora)


def _targets(
    adapters: Mapping[str, Adapter],
    module_name: ModuleName,
    params: Mapping[str, Any] | None,
) -> set[str]:
    """Return `target_modules`: last names, where every module of that name is adapted.

    Where some kernel of the same last name has no adapter, names are given in full.
    """
    in_full = {*adapters}
    if params is not None:
        others = {
            _ending(path) for path in paths.flatten(params) if path not in adapters
        }
        in_full = {path for path in adapters if _ending(path) in others}
    targets = set()
    for path, adapter in adapters.items():
        for index in stack_indices(adapter.kernel.batch_shape):
            name = module_name(path, index)
            targets.add(name if path in in_full else name.rpartition(".")[2])
    return targets


def _ending(path: str) -> tuple[str, ...]:
    """Return the last name of a parameter's module, and the leaf's own."""
    return tuple(path.split("/")[-2:])


def _saved_tensors(
    trainable: Trainable, module_name: ModuleName, params: Mapping[str, Any] | None
) -> dict[str, FullTensor]:
    """Return the tensors of all modules that have a full parameter."""
    specs = [each.part for each in trainable.full.values()]
    check_modules(specs, trainable.adapters)
    tensors = full_tensors(trainable.full, module_name)
    if params is not None:
        rest = neighbours(specs, paths.flatten(params))
        tensors |= full_tensors(_unchanged(rest), module_name)
    return tensors


def _unchanged(leaves: Mapping[str, Any]) -> dict[str, FullParam]:
    """Return parameters that did not train in the form of those that did."""
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise InputError(
                f"PEFT saves whole modules, and {path} belongs to one: give params "
                "with its array, or train it too"
            )
    return {
        path: FullParam(np.asarray(leaf), FullSpec(path=path, shape=tuple(leaf.shape)))
        for path, leaf in leaves.items()
    }


def _factor_tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (down, up, magnitude) in factors.items():
        if is_embedding(name):
            tensors[embedding_factor_name(name, "A")] = np.ascontiguousarray(up)
            tensors[embedding_factor_name(name, "B")] = np.ascontiguousarray(down)
        else:
            tensors[factor_name(name, "A")] = np.ascontiguousarray(down.T)
            tensors[factor_name(name, "B")] = np.ascontiguousarray(up.T)
        if magnitude is not None:
            tensors[magnitude_name(name)] = magnitude
    return tensors


def _full_values(tensors: Mapping[str, FullTensor]) -> dict[str, np.ndarray]:
    """Return {name in PEFT's file: trained values or rows}."""
    values = {}
    for name, each in tensors.items():
        stored = f"{each.module}.{TRAINED_ROWS}" if each.rows else name
        values[PREFIX + stored] = each.value
    return values
