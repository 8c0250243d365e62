"""Write adapters in the format of Hugging Face PEFT, exactly.

What a method adds to a kernel is one ordinary LoRA, whatever the method:

    dK = gamma A B + L diag(g + o) R^T = down @ up

PEFT computes `y + (lora_alpha / r) lora_B(lora_A(x))` with torch's transposed weights,
so lora_A = down^T and lora_B = up^T with lora_alpha = r, and nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Directions, low_rank_factors
from tsd_jax.core.errors import InputError

ModuleName = Callable[[str, int | None], str]
Factors = tuple[np.ndarray, np.ndarray]


def to_peft(
    folder: str | Path,
    adapters: Mapping[str, Adapter],
    directions: Mapping[str, Directions],
    module_name: ModuleName,
    *,
    base_model: str,
    params: Mapping[str, Any] | None = None,
) -> int:
    """Write `adapter_config.json` and `adapter_model.safetensors`, loaded by PEFT.

    Columns of L that are zero (before launch, all of them), or have no coordinate
    along them, are left out.

    Args:
      folder: made if it is not there.
      adapters: {kernel path: Adapter}, on this host.
      directions: {kernel path: Directions}.
      module_name: (kernel path, layer of a stacked kernel or None) -> name of the
        torch module.
      base_model: name or path of the base model, for the config.
      params: the base's parameter tree. With it, modules are named by their last part
        ("q_proj") where all of that name are adapted; without it, in full.

    Returns:
      The rank of the adapter, the largest of its modules. Servers cap it
      (vLLM: `max_lora_rank`, 16 by default).

    Raises:
      InputError: there is no adapter, or a kernel is stacked along several axes.
    """
    if not adapters:
        raise InputError("there are no adapters to export")
    in_full = _named_in_full(adapters, params)
    factors: dict[str, Factors] = {}
    targets: set[str] = set()
    for path, adapter in adapters.items():
        modules = _modules(path, adapter, directions[path], module_name)
        factors |= modules
        targets |= {n if path in in_full else _last(n) for n in modules}
    ranks = {name: down.shape[1] for name, (down, _) in factors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(save(_tensors(factors), {"format": "pt"}))
    config = _config(ranks, targets, base_model)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return max(ranks.values())


def _modules(
    path: str, adapter: Adapter, directions: Directions, module_name: ModuleName
) -> dict[str, Factors]:
    """Give every torch module that a (stacked) kernel stands for its own factors."""
    down, up = (
        np.asarray(x, np.float32) for x in low_rank_factors(adapter, directions)
    )
    if down.ndim == 2:
        return {module_name(path, None): _trim(down, up, adapter.kernel.rank)}
    if down.ndim > 3:
        raise InputError(
            f"{path} is stacked along {down.ndim - 2} axes; PEFT has a module for each "
            "layer only, so export a model stacked along one axis at most"
        )
    return {
        module_name(path, layer): _trim(*pair, adapter.kernel.rank)
        for layer, pair in enumerate(zip(down, up, strict=True))
    }


def _trim(down: np.ndarray, up: np.ndarray, rank: int) -> Factors:
    """Leave out columns that add nothing, but for one: a rank is needed.

    Those of A stay where B alone is zero, as it is before training.
    """
    coordinates = np.any(up != 0, axis=1)
    coordinates[:rank] = True
    used = np.flatnonzero(np.any(down != 0, axis=0) & coordinates)
    used = used if len(used) else [0]
    return down[:, used], up[used]


def _named_in_full(
    adapters: Mapping[str, Adapter], params: Mapping[str, Any] | None
) -> set[str]:
    """Give the kernels whose module's last name some kernel without adapter shares."""
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
    for name, (down, up) in factors.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(down.T)
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(up.T)
    return tensors


def _config(
    ranks: Mapping[str, int], targets: set[str], base_model: str
) -> dict[str, Any]:
    """Describe the adapter as `peft.LoraConfig` reads it."""
    rank = max(ranks.values())
    others = {name: r for name, r in sorted(ranks.items()) if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
