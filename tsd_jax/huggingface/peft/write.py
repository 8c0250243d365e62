"""Write adapters in the format of Hugging Face PEFT, exactly.

What a method adds to a kernel is one ordinary LoRA, whatever the method:

    dK = gamma A B + L diag(g + o) R^T = down @ up

PEFT computes `y + (lora_alpha / r) lora_B(lora_A(x))` with torch's transposed weights,
so lora_A = down^T and lora_B = up^T with lora_alpha = r, and nothing is rounded. DoRA's
m is its lora_magnitude_vector, over the norms of the same K + dK.

Parts trained whole are its `modules_to_save`, whole modules under their own names, and
rows of an embedding its `trainable_token_indices`: the trained rows alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
from tsd_jax.huggingface import full_tensors
from tsd_jax.huggingface.factors import Factors, ModuleName
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.peft import experts
from tsd_jax.huggingface.vocabulary import EMBEDDING, HEAD
from tsd_jax.storage.files import write_json, write_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
ROWS = "token_adapter.trainable_tokens_delta"
"""The name of an embedding's trained rows, which are values and no differences."""
CLASSIFIER = "classifier"
"""The module that PEFT itself saves of a classification."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftExport:
    """Say what was written.

    Attributes:
      rank: of the adapter, the largest of its modules. Servers cap it (vLLM:
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
    task_type: str = "CAUSAL_LM",
) -> PeftExport:
    """Write `adapter_config.json` and `adapter_model.safetensors`, loaded by PEFT.

    Columns of L that are zero (before launch, all of them), or have no coordinate
    along them, are left out.

    Args:
      folder: made if it is not there.
      trainable: on this host.
      directions: {kernel path: Directions}.
      module_name: (path, layer of a stacked leaf or None) -> name of the torch module.
      base_model: name or path of the base model, for the config.
      params: the base's parameter tree. With it, modules are named by their last part
        ("q_proj") where all of that name are adapted; without it, in full. Where a
        part is not all of its module, as a weight beside a frozen bias, it has the
        arrays of the rest, which PEFT saves along.
      max_rank: cut modules of a higher rank to this one, by the SVD of their factors;
        what that costs is returned and logged. Without it the export is exact. With
        DoRA magnitudes stay, and the cost is of dK, before columns are scaled.
      task_type: of PEFT; "SEQ_CLS" for a classification or regression.

    Raises:
      InputError: there is no adapter, some kernels have DoRA and some have not,
        max_rank is below 1, the folder cannot be written, or PEFT has no place for a
        part: beside an adapted kernel, or rows of something else than a tensor's first
        axis.
    """
    kernels, parts = trainable.adapters, trainable.full
    factors = low_rank.module_factors(kernels, directions, module_name)
    specs = [each.part for each in parts.values()]
    full_tensors.check_modules(specs, kernels)
    tensors = full_tensors.full_tensors(parts, module_name)
    tied = params is None or "lm_head" not in params
    if params is not None:
        rest = full_tensors.neighbours(specs, paths.flatten(params))
        tensors |= full_tensors.full_tensors(_as_they_are(rest), module_name)
    in_full = _named_in_full(kernels, params)
    targets = set()
    for path, adapter in kernels.items():
        names = _names(path, adapter, module_name)
        targets |= {n if path in in_full else _last(n) for n in names}
    return write_adapter(
        folder,
        factors,
        targets,
        base_model=base_model,
        max_rank=max_rank,
        tensors=tensors,
        tied=tied,
        task_type=task_type,
    )


def _as_they_are(leaves: Mapping[str, Any]) -> dict[str, FullParam]:
    """Take parameters that did not train as parts."""
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


def write_adapter(
    folder: str | Path,
    factors: Mapping[str, Factors],
    targets: set[str],
    *,
    base_model: str,
    max_rank: int | None = None,
    tensors: Mapping[str, FullTensor] = MappingProxyType({}),
    tied: bool = False,
    task_type: str = "CAUSAL_LM",
) -> PeftExport:
    """Write {torch module: factors} as a PEFT adapter; see `to_peft`.

    Args:
      folder: made if it is not there.
      factors: dK of every module, its scale within.
      targets: what `target_modules` shall say.
      base_model: for the config. max_rank: as in `to_peft`.
      tensors: {name: what trained whole}.
      tied: whether the base's head may be its embedding.
      task_type: of PEFT.
    """
    dora = _uses_dora(factors)
    cut: dict[str, tuple[float, float]] = {}
    if max_rank is not None:
        small = {n: low_rank.compress(f, max_rank) for n, f in factors.items()}
        cut = {name: (each.lost, each.norm) for name, each in small.items()}
        factors = {name: each.factors for name, each in small.items()}
    given = {*factors}
    factors, rank = experts.complete(factors)
    targets = targets | (factors.keys() - given)
    ranks = {name: each.rank for name, each in factors.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored = _tensors(factors) | _whole_tensors(tensors)
        config = _config(ranks, rank, targets, base_model, dora)
        config |= _whole_config(tensors)
        config["task_type"] = task_type
        if tied and EMBEDDING in tensors and tensors[EMBEDDING].rows is None:
            config["ensure_weight_tying"] = True
            stored[PREFIX + HEAD] = tensors[EMBEDDING].value
        write_tensors(folder / WEIGHTS, stored, {"format": "pt"})
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror})") from error
    errors = {name: low_rank.relative(*pair) for name, pair in cut.items()}
    export = PeftExport(
        rank=max(ranks.values()),
        errors={name: error for name, error in errors.items() if error},
        error=low_rank.total(cut) if cut else 0.0,
        dora=dora,
    )
    for name, error in export.errors.items():
        _log.info("%s: cut to rank %d, relative error %.3g", name, max_rank, error)
    return export


def _uses_dora(factors: Mapping[str, Factors]) -> bool:
    """Return whether modules have DoRA; PEFT has one setting for all of them."""
    having = {name for name, each in factors.items() if each.magnitude is not None}
    plain = factors.keys() - having
    if having and plain:
        raise InputError(
            f"{min(having)} has DoRA and {min(plain)} has not, and PEFT's use_dora is "
            "one for all modules: adapt all kernels alike, or export them merged"
        )
    stacked = having & experts.as_parameters(having)
    if stacked:
        raise InputError(
            f"{min(stacked)} has DoRA, and PEFT has none for experts and routers: "
            "leave them out of DoRA's rules, or export them merged"
        )
    return bool(having)


def _names(path: str, adapter: Adapter, module_name: ModuleName) -> list[str]:
    indices = low_rank.stack_indices(adapter.kernel.batch_shape)
    return [module_name(path, index) for index in indices]


def _named_in_full(
    adapters: Mapping[str, Adapter], params: Mapping[str, Any] | None
) -> set[str]:
    """Return the kernels whose module's last name some kernel without adapter shares."""
    if params is None:
        return set(adapters)

    def ending(path: str) -> list[str]:
        return path.split("/")[-2:]

    others = [ending(path) for path in paths.flatten(params) if path not in adapters]
    return {path for path in adapters if ending(path) in others}


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _tensors(factors: Mapping[str, Factors]) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (down, up, magnitude) in factors.items():
        prefix = PREFIX + name
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(down.T)
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(up.T)
        if magnitude is not None:
            tensors[f"{prefix}.{MAGNITUDE}"] = magnitude
    return tensors


def _whole_tensors(tensors: Mapping[str, FullTensor]) -> dict[str, np.ndarray]:
    """Name what trained whole as PEFT does."""
    return {
        f"{PREFIX}{each.module}.{ROWS}" if each.rows else PREFIX + name: each.value
        for name, each in tensors.items()
    }


def _saved(each: FullTensor) -> str:
    """Name the module that PEFT saves; it takes a classifier of several as one."""
    first, _, _ = each.module.partition(".")
    return first if first == CLASSIFIER else each.module


def _whole_config(tensors: Mapping[str, FullTensor]) -> dict[str, Any]:
    """Say which modules, and which rows of others, take the base's place."""
    modules = sorted({_saved(each) for each in tensors.values() if each.rows is None})
    rows = {each.module: list(each.rows) for each in tensors.values() if each.rows}
    return {"modules_to_save": modules or None, "trainable_token_indices": rows or None}


def _pattern(name: str, ranks: Mapping[str, int]) -> str:
    """Return a regular expression by which PEFT finds this module and no other rank.

    PEFT takes the first key that matches the end of a module's name, from a dot on.
    """
    found = re.compile(rf"(.*\.)?({name})$")
    meant = all(ranks[n] == ranks[name] for n in ranks if found.match(n))
    return name if meant else "^" + re.escape(name)


def _config(
    ranks: Mapping[str, int],
    rank: int,
    targets: set[str],
    base_model: str,
    dora: bool,
) -> dict[str, Any]:
    """Describe the adapter as `peft.LoraConfig` reads it, `rank` being its default."""
    rank = rank or max(ranks.values())
    others = {
        _pattern(name, ranks): r for name, r in sorted(ranks.items()) if r != rank
    } | experts.patterns(ranks, rank)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        **experts.targets(ranks, targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": dora,
        "use_rslora": False,
    }
