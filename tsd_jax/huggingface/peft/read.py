"""Start from a LoRA adapter in the format of Hugging Face PEFT.

    found = from_peft(folder, module_paths(params))
    spec = make_spec(model.apply, variables, found.rules(), tokens, method="tsd")
    trainable, directions = found.start(key, spec)

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, AllDirections, Trainable, init
from tsd_jax.core.dora import column_norms
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullParam
from tsd_jax.core.spec import SCALINGS, KernelSpec, Rule, Spec
from tsd_jax.huggingface.factors import Factors, StackIndex, compress
from tsd_jax.huggingface.full_tensors import FullTensor, filled, full_rule
from tsd_jax.huggingface.peft.files import PeftModule, read_modules
from tsd_jax.huggingface.peft.full_params import read_full

ParamSlot = tuple[str, int | None]
"""Where a torch module's weight is: kernel path, layer of a stacked kernel or None."""

_log = logging.getLogger(__name__)


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

    kernels: Mapping[str, Mapping[StackIndex, PeftModule]]
    scaling: str
    dropout: float
    base_model: str | None
    notes: tuple[str, ...]
    parts: Mapping[str, Mapping[StackIndex, FullTensor]] = dataclasses.field(
        default_factory=dict
    )

    def rules(
        self, *, directions: int = 8, dropout: float | None = None
    ) -> tuple[Rule | Full, ...]:
        """Return one rule a kernel: the adapter's own rank, alpha and scaling.

        Parts that it trains whole have a rule each; rows of an embedding one over all
        from the first to the last.

        Where the layers of a stacked kernel differ, it is the largest rank and that
        layer's alpha.

        Args:
          directions: s, for the methods that have gains.
          dropout: instead of the adapter's own.
        """
        rules: list[Rule | Full] = []
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
        rules += [full_rule(path, layers) for path, layers in self.parts.items()]
        return tuple(rules)

    def start(
        self,
        key: jax.Array,
        spec: Spec,
        dtype: jnp.dtype = jnp.float32,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[Trainable, AllDirections]:
        """Return adapters with this adapter's function, and directions still zero.

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
        trained = {*spec.paths, *(part.path for part in spec.full)}
        for path in (*self.kernels, *self.parts):
            if path not in trained:
                raise InputError(
                    f"the adapter changes {path}, which the spec does not adapt: make "
                    "the spec with its rules"
                )
        trainable, directions = init(key, spec, dtype, params=params)
        adapters, full = dict(trainable.adapters), dict(trainable.full)
        for part in spec.full:
            start = np.asarray(full[part.path].value)
            value = filled(start, part, self.parts.get(part.path, {}))
            full[part.path] = FullParam(jnp.asarray(value), part)
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
        return Trainable(adapters=adapters, full=full), directions


def from_peft(
    folder: str | Path,
    places: Mapping[str, ParamSlot],
    tensors: Mapping[str, ParamSlot] | None = None,
) -> PeftAdapter:
    """Read a LoRA adapter that PEFT saved.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      places: {torch module: (kernel path, layer of a stacked kernel or None)}; for the
        models here `tsd_jax.huggingface.module_paths` gives it.
      tensors: {torch tensor: (parameter path, layer or None)}, for adapters that train
        parts whole; `tsd_jax.huggingface.tensor_paths` gives it.

    Raises:
      InputError: a file is missing or damaged, the adapter is no plain LoRA, or it
        changes a module or tensor that the places do not have; one line says which
        and why.
    """
    config, modules = read_modules(folder)
    scaling = "rslora" if config.get("use_rslora") else "lora"
    kernels: dict[str, dict[StackIndex, PeftModule]] = {}
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
    folder: Path, places: Mapping[str, ParamSlot] | None
) -> dict[str, dict[StackIndex, FullTensor]]:
    """Find the parameters that the adapter trains whole."""
    parts: dict[str, dict[StackIndex, FullTensor]] = {}
    for name, tensor in read_full(folder).items():
        if places is None:
            raise InputError(
                f"{folder} trains {name} whole: give the places of tensors "
                "(huggingface.tensor_paths)"
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


def _cut(module: PeftModule, rank: int, scaling: str) -> PeftModule:
    """Write the same product in the columns a matrix of this size needs."""
    down, up, _ = compress(Factors(module.a, module.b), rank).factors
    alpha = module.scale / SCALINGS[scaling](1.0, rank)
    scale = SCALINGS[scaling](alpha, rank)
    return PeftModule(down, up, alpha, scale, module.magnitude)


def _notes(
    path: str, layers: Mapping[StackIndex, PeftModule], stacked: int
) -> list[str]:
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
    layer: StackIndex,
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
    adapter: Adapter, layers: Mapping[StackIndex, PeftModule], base: jax.Array
) -> Adapter:
    """Start m where the adapter has it; elsewhere at ||K + dK||, changing nothing."""
    kernel = adapter.kernel
    up = kernel.scale * adapter.b
    magnitude = np.array(column_norms(base, adapter.a, up, layout=kernel.layout))
    for layer, module in layers.items():
        if module.magnitude is not None:
            magnitude[() if layer is None else layer] = module.magnitude
    return adapter.replace(magnitude=jnp.asarray(magnitude, adapter.a.dtype))
