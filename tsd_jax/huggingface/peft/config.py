"""The content of adapter_config.json, as PEFT's `LoraConfig` reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.peft import experts
from tsd_jax.huggingface.peft.names import CLASSIFIER


def adapter_config(
    ranks: Mapping[str, int],
    targets: set[str],
    tensors: Mapping[str, FullTensor],
    *,
    default_rank: int,
    base_model: str,
    dora: bool,
    task_type: str | None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the config of an adapter whose scale is in its factors (alpha = rank).

    Args:
      ranks: {torch module: its rank}.
      targets: `target_modules` as it would be without experts and routers.
      tensors: {torch tensor: its trained values}.
      default_rank: `r`; every other rank has an entry in `rank_pattern`.
      base_model: name or path of the base.
      dora: whether all modules have magnitudes.
      task_type: of PEFT, or None.
      revision: of the base on the hub, or None.
    """
    others = {
        _pattern(name, ranks): rank
        for name, rank in sorted(ranks.items())
        if rank != default_rank
    } | experts.patterns(ranks, default_rank)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": default_rank,
        "lora_alpha": default_rank,
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
        **_full_config(tensors),
        "task_type": task_type,
    }


def _full_config(tensors: Mapping[str, FullTensor]) -> dict[str, Any]:
    """Return the entries about modules, and rows of modules, trained in full."""
    modules = sorted({_saved(each) for each in tensors.values() if each.rows is None})
    rows = {each.module: list(each.rows) for each in tensors.values() if each.rows}
    return {"modules_to_save": modules or None, "trainable_token_indices": rows or None}


def _pattern(name: str, ranks: Mapping[str, int]) -> str:
    """Return a regular expression by which PEFT finds this module and no other rank.

    PEFT takes the first key that matches the end of a module's name, from a dot on.
    """
    ending = re.compile(rf"(.*\.)?({name})$")
    unique = all(ranks[n] == ranks[name] for n in ranks if ending.match(n))
    return name if unique else "^" + re.escape(name)


def _saved(each: FullTensor) -> str:
    """Return the module that PEFT saves; it saves a classifier of several as one."""
    first, _, _ = each.module.partition(".")
    return first if first == CLASSIFIER else each.module
