"""LoRA-Dash, LoRA-Init and LoRA-TSD for JAX and Flax (arXiv:2409.01035)."""

import importlib
from typing import TYPE_CHECKING, Any

from tsd_jax.binding.linen import adapted, bind, einsum, make_spec
from tsd_jax.binding.linen_handlers import HANDLERS, Call
from tsd_jax.core.adapter import (
    Adapter,
    Directions,
    delta,
    init,
    low_rank_factors,
    merge,
)
from tsd_jax.core.errors import InputError
from tsd_jax.core.launch import Extraction, Ranking, launch
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import METHODS, Method, get_method
from tsd_jax.core.parts import Part, Whole, WholeSpec
from tsd_jax.core.quantised import Quantised, Quantization, quantise
from tsd_jax.core.ranking import rank_directions
from tsd_jax.core.spec import KernelSpec, Rule, Spec
from tsd_jax.interchange.merged import MergedExport, to_merged
from tsd_jax.interchange.native import SavedAdapter, load_adapter, save_adapter
from tsd_jax.interchange.peft import PeftExport, to_peft
from tsd_jax.interchange.peft_reader import PeftAdapter, from_peft
from tsd_jax.training.optimizer import (
    group_labels,
    make_optimizer,
    make_schedule,
    reset_moments,
)
from tsd_jax.training.spectra_store import SpectraFolder

if TYPE_CHECKING:
    from tsd_jax.binding import nnx

__all__ = [
    "HANDLERS",
    "METHODS",
    "Adapter",
    "Call",
    "Directions",
    "Extraction",
    "InputError",
    "KernelSpec",
    "Layout",
    "MergedExport",
    "Method",
    "Part",
    "PeftAdapter",
    "PeftExport",
    "Quantised",
    "Quantization",
    "Ranking",
    "Rule",
    "SavedAdapter",
    "Spec",
    "SpectraFolder",
    "Whole",
    "WholeSpec",
    "adapted",
    "bind",
    "delta",
    "einsum",
    "from_peft",
    "get_method",
    "group_labels",
    "init",
    "launch",
    "load_adapter",
    "low_rank_factors",
    "make_optimizer",
    "make_schedule",
    "make_spec",
    "merge",
    "nnx",
    "quantise",
    "rank_directions",
    "reset_moments",
    "save_adapter",
    "to_merged",
    "to_peft",
]


def __getattr__(name: str) -> Any:
    """Import the NNX binding, and `flax.nnx` with it, when it is first used."""
    if name == "nnx":
        return importlib.import_module("tsd_jax.binding.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
