"""Read the files of an adapter that Hugging Face PEFT saved, module by module.

What is no plain LoRA of linear modules, or of experts as parameters, is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import SCALINGS
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.peft import experts
from tsd_jax.huggingface.peft.full_params import is_full
from tsd_jax.huggingface.peft.write import CONFIG, MAGNITUDE, PREFIX, WEIGHTS
from tsd_jax.storage.files import read_json, read_tensors

# Fields of the config that make something else than a plain LoRA of it, and what it is.
_OTHER = {
    "lora_bias": "biases of its own",
    "layer_replication": "a base with repeated layers",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "use_qalora": "a QALoRA adapter",
    "use_bdlora": "a block-diagonal adapter",
    "arrow_config": "a router over adapters",
    "kasa_config": "a KaSA adapter, which changes its base",
    "monteclora_config": "a MonteCLoRA adapter",
}
# Starts that take something out of the base's weights, which the adapter puts back.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """Hold one module's LoRA: dW^T = scale A B.

    Attributes:
      a: A, (in, r). b: B, (r, out); float32.
      alpha: lora_alpha. scale: of the product.
      magnitude: m of DoRA, (out,), or None.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.a.shape[1]

    @property
    def factors(self) -> Factors:
        """The product with its scale within."""
        return Factors(self.a, np.float32(self.scale) * self.b, self.magnitude)


def read_modules(folder: str | Path) -> tuple[dict[str, Any], dict[str, PeftModule]]:
    """Read an adapter's config, and {torch module: its LoRA}.

    Raises:
      InputError: as `from_peft`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    _refuse_others(folder, config)
    weights = folder / WEIGHTS
    if not weights.is_file() and weights.with_suffix(".bin").is_file():
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle, which is not opened here: "
            "load it with PEFT and save it again with safe_serialization=True"
        )
    tensors, _ = read_tensors(weights)
    factors = [name for name in tensors if not is_full(name, config)]
    names = sorted({_module_of(weights, tensor) for tensor in factors})
    if not names:
        raise InputError(f"{weights} holds no LoRA tensors: fetch it again")
    for name in names:
        if not _is_target(name, config):
            raise InputError(
                f"{weights} holds tensors of {name}, which target_modules of {CONFIG} "
                "does not name: they are not of one adapter"
            )
    modules: dict[str, PeftModule] = {}
    for name in names:
        parameter = experts.stacked_parameter(name, _parameters(config))
        if parameter is None:
            modules[name] = _read_module(weights, config, tensors, name)
        else:
            modules |= _read_experts(weights, config, tensors, name, parameter)
    return config, modules


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse by name every adapter that is no plain LoRA on an untouched base."""
    file = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type is {config.get('peft_type')!r}, and only 'LORA' is read"
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{file}: bias is {config['bias']!r}, and trained biases have no place "
            "here; only 'none' is read"
        )
    for name, what in _OTHER.items():
        if config.get(name):
            raise InputError(f"{file}: {name} is {config[name]!r}: it is {what}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {start!r}: the adapter belongs to a base "
            "whose weights that start has changed; let PEFT convert it to a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _module_of(file: Path, tensor: str) -> str:
    """Return the module a tensor belongs to, refusing what is no LoRA factor."""
    found = re.fullmatch(
        rf"{re.escape(PREFIX)}(.+)\.(lora_[AB]\.weight|{MAGNITUDE})",
        tensor,
        flags=re.DOTALL,
    )
    if not found:
        raise InputError(
            f"{file} holds tensor {tensor!r}: only lora_A, lora_B and {MAGNITUDE} of "
            "linear modules are read (weights of the base come in by "
            "save_embedding_layers)"
        )
    return found[1]


def _is_target(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether PEFT adapts a module: a list of endings, or one expression."""
    targets = config.get("target_modules")
    parameters = _parameters(config)
    wrapped = experts.stacked_parameter(name, parameters) or f"{name}.weight"
    if any(wrapped == end or wrapped.endswith(f".{end}") for end in parameters):
        return True
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return _matches(re.fullmatch, targets, name)
    return any(name == end or name.endswith(f".{end}") for end in targets)


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first key that fits the end of its name."""
    for key, value in (patterns or {}).items():
        if _matches(re.match, rf"(.*\.)?({key})$", name):
            return value
    return default


def _matches(match: Any, pattern: str, name: str) -> bool:
    try:
        return bool(match(pattern, name))
    except re.error as error:
        raise InputError(
            f"{CONFIG}: {pattern!r} is no regular expression ({error})"
        ) from None


def _read_module(
    file: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], name: str
) -> PeftModule:
    """Return one module's LoRA; the config must agree with the tensors' shapes."""
    key = name
    if any(f".{name}.weight".endswith(f".{end}") for end in _parameters(config)):
        key = f"{name}.weight"  # PEFT looks a parameter up by its own name
    low, high, rank, alpha, scale = _read_factors(file, config, tensors, name, key)
    if not (low.shape[0] == high.shape[1] == rank):
        raise _odd_rank(file, name, low, high, rank)
    a, b = (np.ascontiguousarray(x.T, dtype=np.float32) for x in (low, high))
    magnitude = _read_magnitude(file, config, tensors, name, b.shape[1])
    return PeftModule(a, b, alpha, scale, magnitude)


def _read_experts(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    name: str,
    parameter: str,
) -> dict[str, PeftModule]:
    """Return the LoRA of each matrix of the experts that `parameter` stacks."""
    low, high, rank, alpha, scale = _read_factors(
        file, config, tensors, name, parameter
    )
    if low.shape[0] != high.shape[1] or not rank or low.shape[0] % rank:
        raise _odd_rank(file, name, low, high, rank)
    return {
        module: PeftModule(a, b, alpha, scale)
        for module, (a, b) in experts.split(parameter, low, high, rank).items()
    }


def _parameters(config: Mapping[str, Any]) -> Collection[str]:
    return config.get("target_parameters") or ()


def _odd_rank(
    file: Path, name: str, low: np.ndarray, high: np.ndarray, rank: Any
) -> InputError:
    return InputError(
        f"{file}: {name} has factors {low.shape} and {high.shape}, and {CONFIG} "
        f"gives it rank {rank}: fetch both again"
    )


def _read_factors(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    name: str,
    key: str,
) -> tuple[np.ndarray, np.ndarray, int, float, float]:
    """Return lora_A, lora_B, rank, alpha and scale; patterns are looked up by `key`."""
    low, high = (
        tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in ("A", "B")
    )
    if low is None or high is None:
        raise InputError(f"{file} lacks one factor of {name}: fetch it again")
    rank = _by_pattern(config.get("rank_pattern"), key, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha"))
    if low.ndim != 2 or high.ndim != 2:
        raise InputError(
            f"{file}: {name} is no linear module: its factors are no matrices"
        )
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InputError(f"{file}: {name} has lora_alpha {alpha!r}, not above 0")
    low, high = (np.asarray(each, np.float32) for each in (low, high))
    scaling = SCALINGS["rslora" if config.get("use_rslora") else "lora"]
    return low, high, rank, float(alpha), scaling(alpha, rank)


def _read_magnitude(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    name: str,
    size: int,
) -> np.ndarray | None:
    """Return one module's DoRA magnitudes (out,), where the config says it has them."""
    magnitude = tensors.get(f"{PREFIX}{name}.{MAGNITUDE}")
    wanted = (size,) if config.get("use_dora") else "none"
    found = "none" if magnitude is None else magnitude.shape
    if found != wanted:
        raise InputError(
            f"{file}: {name} has {MAGNITUDE} {found}, and {CONFIG} (use_dora) asks for "
            f"{wanted}: fetch both again"
        )
    return None if magnitude is None else np.asarray(magnitude, np.float32)
