"""The LoRA of each torch module, sorted out of the files of a PEFT adapter.

Only LoRA of linear modules, of embeddings, and of experts as parameters, is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import SCALINGS
from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.model_folder import ADAPTER_CONFIG_FILE
from tsd_jax.huggingface.names import HEAD
from tsd_jax.huggingface.peft import experts
from tsd_jax.huggingface.peft.base_copies import copied_tensor
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.full_params import is_full
from tsd_jax.huggingface.peft.names import (
    MAGNITUDE,
    PREFIX,
    embedding_factor_name,
    factor_name,
    magnitude_name,
)


@dataclasses.dataclass(frozen=True)
class PeftModule:
    """One module's LoRA: dW^T = scale A B.

    Attributes:
      a: A, (in, r), float32.
      b: B, (r, out), float32.
      alpha: lora_alpha.
      scale: of the product.
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
        """The product with its scale in it."""
        return Factors(self.a, np.float32(self.scale) * self.b, self.magnitude)


def modules_of(files: AdapterFiles) -> dict[str, PeftModule]:
    """Return {torch module: its LoRA}.

    Args:
      files: of the adapter.

    Raises:
      InputError: a tensor is not LoRA of a linear module, or config and tensors
        disagree.
    """
    lora = [
        name
        for name in files.tensors
        if not is_full(name, files.config) and copied_tensor(name) is None
    ]
    names = sorted({_module_of(files, tensor) for tensor in lora})
    if not names:
        raise InputError(f"{files.weights} holds no LoRA tensors: fetch it again")
    for name in names:
        if not _is_target(name, files):
            raise InputError(
                f"{files.weights} holds tensors of {name}, which is not among "
                f"target_modules of {ADAPTER_CONFIG_FILE}: fetch both again"
            )
    modules: dict[str, PeftModule] = {}
    for name in names:
        parameter = experts.stacked_parameter(name, files.parameters)
        if parameter is None:
            modules[name] = _read_module(files, name)
        else:
            modules |= _read_experts(files, name, parameter)
    return modules


class _StoredFactors(NamedTuple):
    """One module's tensors, and what the config says of them."""

    low: np.ndarray
    high: np.ndarray
    rank: int
    alpha: float
    scale: float


def _module_of(files: AdapterFiles, tensor: str) -> str:
    """Return the module of a tensor, refusing what is not LoRA."""
    found = re.fullmatch(
        rf"{re.escape(PREFIX)}(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|{MAGNITUDE})",
        tensor,
        flags=re.DOTALL,
    )
    if not found:
        raise InputError(
            f"{files.weights} holds tensor {tensor!r}: only lora_A, lora_B and "
            f"{MAGNITUDE} of linear modules are read (save_embedding_layers=False "
            "leaves the base's weights out)"
        )
    return found[1]


def _is_target(name: str, files: AdapterFiles) -> bool:
    """Return whether PEFT adapts a module: a list of endings, or one expression."""
    targets, parameters = files.config.get("target_modules"), files.parameters
    if f"{name}.weight" == HEAD and files.config.get("ensure_weight_tying"):
        return True  # PEFT adapts a head that is tied to an embedding it adapts
    wrapped = experts.stacked_parameter(name, parameters) or f"{name}.weight"
    if any(_ends_with(wrapped, ending) for ending in parameters):
        return True
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return _matches(targets, name)
    return any(_ends_with(name, ending) for ending in targets)


def _ends_with(name: str, ending: str) -> bool:
    """Return whether the last parts of a dotted name are `ending`."""
    return f".{name}".endswith(f".{ending}")


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first key that fits the end of its name."""
    for key, value in (patterns or {}).items():
        if _matches(rf"(.*\.)?({key})", name):
            return value
    return default


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(
            f"{ADAPTER_CONFIG_FILE}: {pattern!r} is not a regular expression ({error})"
        ) from None


def _read_module(files: AdapterFiles, name: str) -> PeftModule:
    """Return one module's LoRA; the config must agree with the tensors' shapes."""
    key = name
    if any(_ends_with(f"{name}.weight", ending) for ending in files.parameters):
        key = f"{name}.weight"  # PEFT looks a parameter up by its own name
    found = _read_factors(files, name, key)
    if not (found.low.shape[0] == found.high.shape[1] == found.rank):
        raise _rank_error(files, name, found)
    a, b = (
        np.ascontiguousarray(x.T, dtype=np.float32) for x in (found.low, found.high)
    )
    magnitude = _read_magnitude(files, name, b.shape[1])
    return PeftModule(a, b, found.alpha, found.scale, magnitude)


def _read_experts(
    files: AdapterFiles, name: str, parameter: str
) -> dict[str, PeftModule]:
    """Return the LoRA of each matrix of the experts that `parameter` stacks."""
    found = _read_factors(files, name, parameter)
    rank = found.rank
    fits = found.low.shape[0] == found.high.shape[1]
    if not fits or not rank or found.low.shape[0] % rank:
        raise _rank_error(files, name, found)
    matrices = experts.split(parameter, found.low, found.high, rank)
    return {
        module: PeftModule(a, b, found.alpha, found.scale)
        for module, (a, b) in matrices.items()
    }


def _rank_error(files: AdapterFiles, name: str, found: _StoredFactors) -> InputError:
    return InputError(
        f"{files.weights}: {name} has factors {found.low.shape} and "
        f"{found.high.shape}, and {ADAPTER_CONFIG_FILE} gives it rank {found.rank}: "
        "fetch both again"
    )


def _read_factors(files: AdapterFiles, name: str, key: str) -> _StoredFactors:
    """Return a module's factors; the config's patterns are looked up by `key`."""
    low, high = _stored_factors(files, name)
    if low is None or high is None:
        raise InputError(f"{files.weights} lacks one factor of {name}: fetch it again")
    config = files.config
    rank = _by_pattern(config.get("rank_pattern"), key, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha"))
    if low.ndim != 2 or high.ndim != 2:
        raise InputError(
            f"{files.weights}: the factors of {name} are not matrices; only linear "
            "modules are supported"
        )
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InputError(
            f"{files.weights}: {name} has lora_alpha {alpha!r}, which must be above 0"
        )
    low, high = (np.asarray(each, np.float32) for each in (low, high))
    scaling = SCALINGS["rslora" if config.get("use_rslora") else "lora"]
    return _StoredFactors(low, high, rank, float(alpha), scaling(alpha, rank))


def _stored_factors(
    files: AdapterFiles, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return a module's factors as a linear module has them, (r, in) and (out, r)."""
    if _is_embedding(files, name):
        low, high = (
            files.tensors.get(embedding_factor_name(name, side)) for side in "BA"
        )
        return None if low is None else low.T, None if high is None else high.T
    low, high = (files.tensors.get(factor_name(name, side)) for side in "AB")
    return low, high


def _is_embedding(files: AdapterFiles, name: str) -> bool:
    return embedding_factor_name(name, "A") in files.tensors


def _read_magnitude(files: AdapterFiles, name: str, size: int) -> np.ndarray | None:
    """Return one module's DoRA magnitudes (out,), if the config says it has them."""
    if magnitude_name(name) in files.tensors and _is_embedding(files, name):
        raise InputError(
            f"{files.weights}: {name} is an embedding with DoRA, which is not "
            "supported: merge the adapter with PEFT (merge_and_unload)"
        )
    magnitude = files.tensors.get(magnitude_name(name))
    wanted = (size,) if files.config.get("use_dora") else "none"
    found = "none" if magnitude is None else magnitude.shape
    if found != wanted:
        raise InputError(
            f"{files.weights}: {name} has {MAGNITUDE} {found}, but "
            f"{ADAPTER_CONFIG_FILE} (use_dora) asks for {wanted}: fetch both again"
        )
    return None if magnitude is None else np.asarray(magnitude, np.float32)
