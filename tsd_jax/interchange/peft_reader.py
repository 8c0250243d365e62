"""Start from a LoRA adapter in the format of Hugging Face PEFT.

    found = from_peft(folder, module_places(params))
    spec = make_spec(model.apply, variables, found.rules(), tokens, method="tsd")
    adapters, directions = found.start(key, spec)

PEFT computes `y + s lora_B(lora_A(x))` with s = lora_alpha / r or lora_alpha / sqrt(r),
so A = lora_A^T, B = lora_B^T and gamma = s. An adapter of DoRA has its magnitudes, too;
`modules_to_save` and `trainable_token_indices` become parts that train whole. What else
is no plain LoRA is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, Adapters, AllDirections, init
from tsd_jax.core.errors import InputError
from tsd_jax.core.magnitudes import column_norms
from tsd_jax.core.parts import Part, Whole
from tsd_jax.core.spec import SCALINGS, KernelSpec, Rule, Spec
from tsd_jax.interchange import experts
from tsd_jax.interchange.factors import Factors, Index, compress
from tsd_jax.interchange.files import read_json, read_tensors
from tsd_jax.interchange.peft import CONFIG, MAGNITUDE, PREFIX, WEIGHTS
from tsd_jax.interchange.peft_parts import is_whole, read_whole
from tsd_jax.interchange.whole import WholeTensor, filled, whole_rule

Place = tuple[str, int | None]
"""Where a torch module's weight is: kernel path, layer of a stacked kernel or None."""

_log = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """Hold an adapter that was read, ready for a spec.

    Attributes:
      kernels: {kernel path: {layer, or None: its module's LoRA}}.
      scaling: of the rules, "lora" or "rslora". dropout: it was trained with.
      base_model: name or path of its base, or None.
      notes: what a user should know of the way it fits in, a line each.
      parts: {path: {layer, or None: what it trains whole of it}}.
    """

    kernels: Mapping[str, Mapping[Index, PeftModule]]
    scaling: str
    dropout: float
    base_model: str | None
    notes: tuple[str, ...]
    parts: Mapping[str, Mapping[Index, WholeTensor]] = dataclasses.field(
        default_factory=dict
    )

    def rules(
        self, *, directions: int = 8, dropout: float | None = None
    ) -> tuple[Rule | Whole, ...]:
        """Give one rule a kernel: the adapter's own rank, alpha and scaling.

        Parts that it trains whole have a rule each; rows of an embedding one over all
        from the first to the last.

        Where the layers of a stacked kernel differ, it is the largest rank and that
        layer's alpha.

        Args:
          directions: s, for the methods that have gains.
          dropout: instead of the adapter's own.
        """
        rules: list[Rule | Whole] = []
        for path, layers in self.kernels.items():
            largest = max(layers.values(), key=lambda module: module.rank)
            rule = Rule(
                pattern=re.escape(path),
                rank=largest.rank,
                alpha=largest.alpha,
                directions=directions,
                dropout=self.dropout if dropout is None else dropout,
                scaling=self.scaling,
                dora=largest.magnitude is not None,
            )
            rules.append(rule)
        rules += [whole_rule(path, layers) for path, layers in self.parts.items()]
        return tuple(rules)

    def start(
        self,
        key: jax.Array,
        spec: Spec,
        dtype: jnp.dtype = jnp.float32,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[Adapters, AllDirections]:
        """Give adapters with this adapter's function, and directions still zero.

        A spec may have a larger rank, another scale and more kernels than the
        adapter. Columns of A that it does not have start as `init` starts them,
        beside rows of B that are zero: they add nothing, and they train. Another scale
        goes into B. A plain LoRA on kernels for which the spec has DoRA starts with
        magnitudes ||K + dK||, which change nothing.

        Args:
          key: a JAX random key, for those columns.
          spec: of `make_spec`, with any method; `rules` give one that fits.
          dtype: of all leaves.
          params: the base's tree, needed where the spec trains parts whole or has DoRA.

        Raises:
          InputError: the spec lacks a kernel or part the adapter changes, has a
            smaller rank for it, another shape, or no DoRA where the adapter has it; or
            `params` is missing.
        """
        trained = {*spec.paths, *(part.path for part in spec.whole)}
        for path in (*self.kernels, *self.parts):
            if path not in trained:
                raise InputError(
                    f"the adapter changes {path}, which the spec does not adapt: make "
                    "the spec with its rules"
                )
        adapters, directions = init(key, spec, dtype, params=params)
        for part in spec.whole:
            start = np.asarray(adapters[part.path].value)
            value = filled(start, part, self.parts.get(part.path, {}))
            adapters[part.path] = Part(jnp.asarray(value), part)
        bases = paths.select(
            params or {}, tuple(k.path for k in spec.kernels if k.dora)
        )
        for kernel in spec.kernels:
            layers = self.kernels.get(kernel.path, {})
            adapter = adapters[kernel.path]
            a, b = np.array(adapter.a), np.array(adapter.b)
            for layer, module in layers.items():
                _fill(a, b, kernel, layer, module)
            adapter = adapter.replace(a=jnp.asarray(a), b=jnp.asarray(b))
            if kernel.dora:
                adapter = _with_magnitudes(adapter, layers, bases[kernel.path])
            adapters[kernel.path] = adapter
        return adapters, directions


def from_peft(
    folder: str | Path,
    places: Mapping[str, Place],
    tensors: Mapping[str, Place] | None = None,
) -> PeftAdapter:
    """Read a LoRA adapter that PEFT saved.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      places: {torch module: (kernel path, layer of a stacked kernel or None)}; for the
        models here `tsd_jax.models.huggingface.module_places` gives it.
      tensors: {torch tensor: (parameter path, layer or None)}, for adapters that train
        parts whole; `tsd_jax.models.huggingface.tensor_places` gives it.

    Raises:
      InputError: a file is missing or damaged, the adapter is no plain LoRA, or it
        changes a module or tensor that the places do not have; one line says which
        and why.
    """
    config, modules = read_modules(folder)
    scaling = "rslora" if config.get("use_rslora") else "lora"
    kernels: dict[str, dict[Index, PeftModule]] = {}
    notes: list[str] = []
    for name, module in modules.items():
        if name not in places:
            near = difflib.get_close_matches(name, places, n=1, cutoff=0.0)
            raise InputError(
                f"{folder} adapts {name}, and the model has no such linear module; "
                f"the nearest is {', '.join(near) or 'none'}"
            )
        path, layer = places[name]
        limit = min(module.a.shape[0], module.b.shape[1])
        if module.rank > limit:
            notes.append(
                f"{name}: rank {module.rank} is more than the kernel has; cut to "
                f"{limit}"
            )
            module = _cut(module, limit, scaling)
        kernels.setdefault(path, {})[layer] = module
    for path, layers in kernels.items():
        stacked = len({place for place in places.values() if place[0] == path})
        notes += _notes(path, layers, stacked)
    for note in notes:
        _log.info("%s", note)
    return PeftAdapter(
        kernels=kernels,
        scaling=scaling,
        dropout=float(config.get("lora_dropout") or 0.0),
        base_model=config.get("base_model_name_or_path"),
        notes=tuple(notes),
        parts=_place_parts(Path(folder), tensors),
    )


def _place_parts(
    folder: Path, places: Mapping[str, Place] | None
) -> dict[str, dict[Index, WholeTensor]]:
    """Find the parameters that the adapter trains whole."""
    parts: dict[str, dict[Index, WholeTensor]] = {}
    for name, tensor in read_whole(folder).items():
        if places is None:
            raise InputError(
                f"{folder} trains {name} whole: give the places of tensors "
                "(huggingface.tensor_places)"
            )
        if name not in places:
            near = difflib.get_close_matches(name, places, n=1, cutoff=0.0)
            raise InputError(
                f"{folder} trains {name} whole, and the model has no such tensor; the "
                f"nearest is {', '.join(near) or 'none'}"
            )
        path, layer = places[name]
        parts.setdefault(path, {})[layer] = tensor
    return parts


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
    factors = [name for name in tensors if not is_whole(name, config)]
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
    """Give the module a tensor belongs to, refusing what is no LoRA factor."""
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
    """Tell whether PEFT adapts a module: a list of endings, or one expression."""
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
    """Give one module's LoRA; the config must agree with the tensors' shapes."""
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
    """Give the LoRA of each matrix of the experts that `parameter` stacks."""
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
    """Give lora_A, lora_B, rank, alpha and scale; patterns are looked up by `key`."""
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
    """Give one module's DoRA magnitudes (out,), where the config says it has them."""
    magnitude = tensors.get(f"{PREFIX}{name}.{MAGNITUDE}")
    wanted = (size,) if config.get("use_dora") else "none"
    found = "none" if magnitude is None else magnitude.shape
    if found != wanted:
        raise InputError(
            f"{file}: {name} has {MAGNITUDE} {found}, and {CONFIG} (use_dora) asks for "
            f"{wanted}: fetch both again"
        )
    return None if magnitude is None else np.asarray(magnitude, np.float32)


def _cut(module: PeftModule, rank: int, scaling: str) -> PeftModule:
    """Write the same product in the columns a matrix of this size needs."""
    down, up, _ = compress(Factors(module.a, module.b), rank).factors
    alpha = module.scale / SCALINGS[scaling](1.0, rank)
    scale = SCALINGS[scaling](alpha, rank)
    return PeftModule(down, up, alpha, scale, module.magnitude)


def _notes(path: str, layers: Mapping[Index, PeftModule], stacked: int) -> list[str]:
    """Say how the layers of a stacked kernel were made one shape."""
    notes = []
    ranks = {module.rank for module in layers.values()}
    if len(ranks) > 1:
        notes.append(
            f"{path}: its layers have ranks {sorted(ranks)}; all are padded to "
            f"{max(ranks)}, which adds nothing to the function"
        )
    scales = {module.scale for module in layers.values()}
    if len(scales) > 1:
        notes.append(f"{path}: its layers have {len(scales)} scales; they go into B")
    bare = stacked - len(layers)
    if bare:
        notes.append(
            f"{path}: {bare} of {stacked} layers have no adapter; they start "
            "without effect, and train"
        )
    return notes


def _fill(
    a: np.ndarray,
    b: np.ndarray,
    kernel: KernelSpec,
    layer: Index,
    module: PeftModule,
) -> None:
    """Put one module's LoRA into a kernel's A and B."""
    place = layer if isinstance(layer, tuple) else () if layer is None else (layer,)
    stack = kernel.batch_shape
    if len(place) != len(stack) or any(map(int.__ge__, place, stack)):
        raise InputError(
            f"{kernel.path}: the spec stacks it as {stack}, which has no place for "
            f"layer {layer} of the adapter"
        )
    found = (module.a.shape[0], module.b.shape[1])
    if found != (kernel.fan_in, kernel.fan_out):
        raise InputError(
            f"{kernel.path} is (in, out) = {(kernel.fan_in, kernel.fan_out)}, and the "
            f"adapter is made for {found}: it belongs to another base"
        )
    if module.rank > kernel.rank:
        raise InputError(
            f"{kernel.path}: the adapter has rank {module.rank}, the spec only "
            f"{kernel.rank}: make the spec with the adapter's rules"
        )
    if module.magnitude is not None and not kernel.dora:
        raise InputError(
            f"{kernel.path}: the adapter has DoRA, the spec not: make the spec with "
            "the adapter's rules"
        )
    ratio = np.float64(module.scale) / kernel.scale
    a[(*place, slice(None), slice(module.rank))] = module.a
    b[(*place, slice(None))] = 0
    b[(*place, slice(module.rank))] = module.b * ratio


def _with_magnitudes(
    adapter: Adapter, layers: Mapping[Index, PeftModule], base: jax.Array
) -> Adapter:
    """Start m where the adapter has it; elsewhere at ||K + dK||, changing nothing."""
    kernel = adapter.kernel
    up = kernel.scale * adapter.b
    magnitude = np.array(column_norms(base, adapter.a, up, layout=kernel.layout))
    for layer, module in layers.items():
        if module.magnitude is not None:
            magnitude[() if layer is None else layer] = module.magnitude
    return adapter.replace(magnitude=jnp.asarray(magnitude, adapter.a.dtype))
