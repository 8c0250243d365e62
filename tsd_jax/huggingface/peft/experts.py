"""Experts of a mixture, as PEFT and transformers 5 have them: parameters, not modules.

transformers 5 stacks the experts of a layer, gate and up fused:

    mlp.experts.gate_up_proj (E, 2 I, D)        mlp.experts.down_proj (E, D, I)

PEFT adapts such a parameter by `target_parameters`, E adapters in two factors. On
loading it stacks the adapters of single experts as well, if all three matrices of every
expert have one of one rank, and the config speaks of parameters: that it changes by
itself for some families (Mixtral, Qwen3-MoE) and not for others (Qwen2-MoE).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from tsd_jax.huggingface.factors import Factors

FUSED, DOWN, ROUTER = "gate_up_proj", "down_proj", "gate.weight"
# The matrices of one expert, in two ways of naming them: gate, up, down.
_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"(.*\.experts\.\d+)\.(gate_proj|up_proj|down_proj|w[123])")
_STACKED = re.compile(r"(.*\.experts)(\.base_layer)?")
_ROUTER = re.compile(r".*\.(mlp|block_sparse_moe)\.gate")


def targets(modules: Collection[str], given: Collection[str]) -> dict[str, Any]:
    """Write the entries of PEFT's config that say what is adapted.

    Experts and routers are parameters from transformers 5 on. The modules of experts
    are named as well, as they were before; and by more than "gate_proj", which a shared
    expert has too.

    Args:
      modules: that have factors. given: what `target_modules` shall say but for that.
    """
    found = [name for name in modules if _EXPERT.fullmatch(name)]
    routers = [name for name in modules if _ROUTER.fullmatch(name)]
    if not found and not routers:
        return {"target_modules": sorted(given)}
    given = {*given} - {*routers} - {"gate"}
    short = given & {name.rpartition(".")[2] for name in found}
    longer = {
        _ending(name, 3 if _EXPERT.fullmatch(name) else 2)
        for name in modules
        if name.rpartition(".")[2] in short
    }
    parameters = {f"experts.{each}" for each in (FUSED, DOWN) if found}
    return {
        "target_modules": sorted(given - short | longer),
        "target_parameters": sorted(parameters | ({ROUTER} if routers else set())),
    }


def patterns(modules: Collection[str], rank: int) -> dict[str, int]:
    """Write the rank that PEFT gives gate and up in one: that of both together."""
    fused = any(_EXPERT.fullmatch(name) for name in modules)
    return {rf".*\.{FUSED}": 2 * rank} if fused else {}


def complete(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], int]:
    """Return experts what PEFT asks of them, and nothing that changes the function.

    Returns:
      The factors, with zeros for the matrices that some expert lacks, and all of
      experts and routers filled up with zeros to one rank; and that rank, or 0 where
      there are none.
    """
    found: dict[str, dict[str, Factors]] = {}
    for name, each in factors.items():
        expert = _EXPERT.fullmatch(name)
        if expert:
            found.setdefault(expert[1], {})[expert[2]] = each
    whole = dict(factors)
    for expert, parts in found.items():
        whole |= {f"{expert}.{part}": each for part, each in _all_parts(parts).items()}
    rank = max((whole[name].rank for name in as_parameters(whole)), default=0)
    return whole | {n: _widen(whole[n], rank) for n in as_parameters(whole)}, rank


def as_parameters(modules: Iterable[str]) -> set[str]:
    """Choose the modules that PEFT makes parameters of, all of the default rank."""
    return {n for n in modules if _EXPERT.fullmatch(n) or _ROUTER.fullmatch(n)}


def stacked_parameter(module: str, parameters: Iterable[str]) -> str | None:
    """Name the parameter that a module's factors adapt, or None if it stacks nothing.

    PEFT wraps the experts once for each parameter, down outermost.

    Args:
      module: as tensors of an adapter name it.
      parameters: `target_parameters` of its config.
    """
    found = _STACKED.fullmatch(module)
    if not found:
        return None
    outer = DOWN if any(each.endswith(DOWN) for each in parameters) else FUSED
    return f"{found[1]}.{FUSED if found[2] else outer}"


def split(
    parameter: str, a: np.ndarray, b: np.ndarray, rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each matrix of each expert its own A (in, r) and B (r, out).

    Args:
      parameter: named as by `stacked_parameter`.
      a: lora_A of PEFT, (E r, in), the rank innermost.
      b: lora_B of PEFT, (out, r E), the expert innermost.
      rank: r.
    """
    downs = a.reshape(-1, rank, a.shape[1]).transpose(0, 2, 1)
    ups = b.reshape(b.shape[0], rank, -1).transpose(2, 1, 0)
    experts, _, kind = parameter.rpartition(".")
    parts = _PARTS[0][:2] if kind == FUSED else _PARTS[0][2:]
    return {
        f"{experts}.{number}.{part}": (down, own)
        for number, (down, up) in enumerate(zip(downs, ups, strict=True))
        for part, own in zip(parts, np.split(up, len(parts), axis=1), strict=True)
    }


def _ending(module: str, parts: int) -> str:
    return ".".join(module.split(".")[-parts:])


def _all_parts(parts: Mapping[str, Factors]) -> dict[str, Factors]:
    """Add zeros in place of the matrices of one expert that have no factors."""
    gate, up, down = next(names for names in _PARTS if parts.keys() & {*names})
    some = parts.get(gate, parts.get(up))
    # Down leads back from the width to the stream.
    inner = some or Factors(parts[down].up.T, parts[down].down.T)
    shapes = {gate: inner, up: inner, down: Factors(inner.up.T, inner.down.T)}
    return {
        name: parts.get(name, Factors(0 * like.down, 0 * like.up))
        for name, like in shapes.items()
    }


def _widen(factors: Factors, rank: int) -> Factors:
    """Add columns of zeros, up to `rank` of them."""
    more = rank - factors.rank
    return Factors(
        np.pad(factors.down, ((0, 0), (0, more))),
        np.pad(factors.up, ((0, more), (0, 0))),
    )
