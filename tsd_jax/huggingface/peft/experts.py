"""Experts of a mixture, as PEFT and transformers 5 have them: parameters, not modules.

transformers 5 stacks the experts of a layer, gate and up fused:

    mlp.experts.gate_up_proj (E, 2 I, D)        mlp.experts.down_proj (E, D, I)

PEFT adapts such a parameter by `target_parameters`, E adapters in two factors. On
loading it also stacks the adapters of single experts, if all three matrices of every
expert have one of the same rank and the config names parameters. PEFT converts the
config itself for some families (Mixtral, Qwen3-MoE) and not for others (Qwen2-MoE).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from tsd_jax.huggingface.factors import Factors

FUSED, DOWN, ROUTER = "gate_up_proj", "down_proj", "gate.weight"
# The matrices of one expert under their two sets of names: gate, up, down.
_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"(.*\.experts\.\d+)\.(gate_proj|up_proj|down_proj|w[123])")
_STACKED = re.compile(r"(.*\.experts)(\.base_layer)?")
_ROUTER = re.compile(r".*\.(mlp|block_sparse_moe)\.gate")


def targets(modules: Collection[str], given: Collection[str]) -> dict[str, Any]:
    """Return the entries of PEFT's config that say what is adapted.

    Experts and routers are parameters from transformers 5 on. The modules of experts
    are listed as well, for transformers 4, and by longer names than "gate_proj", which
    a shared expert has too.

    Args:
      modules: that have factors.
      given: `target_modules` as it would be without experts and routers.
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
    """Return the rank of gate and up fused, which is that of both together.

    Args:
      modules: that have factors.
      rank: of each of them.
    """
    fused = any(_EXPERT.fullmatch(name) for name in modules)
    return {rf".*\.{FUSED}": 2 * rank} if fused else {}


def complete(factors: Mapping[str, Factors]) -> tuple[dict[str, Factors], int]:
    """Pad the factors of experts as PEFT requires, without changing the function.

    Args:
      factors: {torch module: factors}.

    Returns:
      The factors, with zeros for matrices that an expert lacks, and those of all
      experts and routers padded with zeros to one rank; and that rank, 0 where there
      are none.
    """
    found: dict[str, dict[str, Factors]] = {}
    for name, each in factors.items():
        expert = _EXPERT.fullmatch(name)
        if expert:
            found.setdefault(expert[1], {})[expert[2]] = each
    padded = dict(factors)
    for expert, some in found.items():
        padded |= {f"{expert}.{name}": each for name, each in _completed(some).items()}
    rank = max((padded[name].rank for name in as_parameters(padded)), default=0)
    return padded | {n: _widen(padded[n], rank) for n in as_parameters(padded)}, rank


def as_parameters(modules: Iterable[str]) -> set[str]:
    """Return the modules that PEFT adapts as parameters, all of the default rank."""
    return {n for n in modules if _EXPERT.fullmatch(n) or _ROUTER.fullmatch(n)}


def stacked_parameter(module: str, parameters: Iterable[str]) -> str | None:
    """Return the stacked parameter that a module's factors adapt; None for a module.

    PEFT wraps the experts once for each parameter, with down as the outermost.

    Args:
      module: its name in the tensors of an adapter.
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
    """Return {module of one expert: its own A (in, r) and B (r, out)}.

    Args:
      parameter: of `stacked_parameter`.
      a: lora_A of PEFT, (E r, in), with the rank innermost.
      b: lora_B of PEFT, (out, r E), with the expert innermost.
      rank: r.
    """
    downs = a.reshape(-1, rank, a.shape[1]).transpose(0, 2, 1)
    ups = b.reshape(b.shape[0], rank, -1).transpose(2, 1, 0)
    experts, _, kind = parameter.rpartition(".")
    names = _MATRICES[0][:2] if kind == FUSED else _MATRICES[0][2:]
    return {
        f"{experts}.{number}.{name}": (down, own)
        for number, (down, up) in enumerate(zip(downs, ups, strict=True))
        for name, own in zip(names, np.split(up, len(names), axis=1), strict=True)
    }


def _ending(module: str, count: int) -> str:
    """Return the last `count` parts of a dotted name."""
    return ".".join(module.split(".")[-count:])


def _completed(some: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return factors of all matrices of one expert: zeros for those without any."""
    gate, up, down = next(names for names in _MATRICES if some.keys() & {*names})
    # Down maps back from the inner width, the other two map to it.
    inner = some.get(gate) or some.get(up)
    inner = inner or Factors(some[down].up.T, some[down].down.T)
    shapes = {gate: inner, up: inner, down: Factors(inner.up.T, inner.down.T)}
    return {
        name: some.get(name, Factors(0 * like.down, 0 * like.up))
        for name, like in shapes.items()
    }


def _widen(factors: Factors, rank: int) -> Factors:
    """Pad factors with zeros to `rank` columns."""
    more = rank - factors.rank
    return Factors(
        np.pad(factors.down, ((0, 0), (0, more))),
        np.pad(factors.up, ((0, more), (0, 0))),
    )
