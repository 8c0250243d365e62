"""LoRA-Dash, LoRA-Init and LoRA-TSD for JAX and Flax (arXiv:2409.01035)."""

import importlib
from typing import TYPE_CHECKING, Any

from tsd_jax.binding.calls import Call
from tsd_jax.binding.linen import (
    adapted,
    bind,
    bind_variables,
    check,
    einsum,
    make_spec,
)
from tsd_jax.binding.linen.handlers import HANDLERS
from tsd_jax.core.adapter import (
    Adapter,
    Directions,
    Trainable,
    delta,
    low_rank_factors,
    merge,
)
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullParam, FullSpec
from tsd_jax.core.initialization import init
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import METHODS, Method, get_method
from tsd_jax.core.quantization import Quantization, Quantized, quantize
from tsd_jax.core.spec import KernelSpec, Rule, Spec
from tsd_jax.evaluation.generation import Generation, generate
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.matrix_launch import Ranking
from tsd_jax.extraction.ranking import rank_directions
from tsd_jax.extraction.settings import Extraction
from tsd_jax.huggingface.merge import MergedExport, to_merged
from tsd_jax.huggingface.peft.read import PeftAdapter, from_peft
from tsd_jax.huggingface.peft.write import PeftExport, to_peft
from tsd_jax.storage.adapter_file import SavedAdapter, load_adapter, save_adapter
from tsd_jax.storage.spectra_folder import SpectraFolder
from tsd_jax.training.moments import reset_moments
from tsd_jax.training.optimizer import group_labels, make_optimizer, make_schedule

if TYPE_CHECKING:
    from tsd_jax.binding import nnx

__version__ = "0.2.0"

__all__ = [
    "HANDLERS",
    "METHODS",
    "Adapter",
    "Call",
    "Directions",
    "Extraction",
    "Full",
    "FullParam",
    "FullSpec",
    "Generation",
    "InputError",
    "KernelSpec",
    "Layout",
    "MergedExport",
    "Method",
    "PeftAdapter",
    "PeftExport",
    "Quantization",
    "Quantized",
    "Ranking",
    "Rule",
    "SavedAdapter",
    "Spec",
    "SpectraFolder",
    "Trainable",
    "adapted",
    "bind",
    "bind_variables",
    "check",
    "delta",
    "einsum",
    "from_peft",
    "generate",
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
    "quantize",
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
