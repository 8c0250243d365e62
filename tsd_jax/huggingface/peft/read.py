"""Start from a LoRA adapter in the format of Hugging Face PEFT.

    found = from_peft(folder, module_paths(params))
    spec = make_spec(model.apply, variables, found.rules(), tokens, method="tsd")
    trainable, directions = found.start(key, spec)

PEFT computes `y + s lora_B(lora_A(x))` with s = lora_alpha / r or lora_alpha / sqrt(r),
so A = lora_A^T, B = lora_B^T and gamma = s. A DoRA adapter has its magnitudes as well;
`modules_to_save` and `trainable_token_indices` become full parameters. Anything else is
refused by name.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core import paths
from tsd_jax.core.adapter import Adapter, AllDirections, Trainable
from tsd_jax.core.dora import column_norms
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullParam
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import SCALINGS, KernelSpec, Rule, Spec
from tsd_jax.huggingface.factors import Factors, compress
from tsd_jax.huggingface.full_tensors import FullTensor, filled, full_rule
from tsd_jax.huggingface.names import (
    HEAD,
    ParamSlot,
    StackIndex,
    axis_indices,
)
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.modules import PeftModule, modules_of
from tsd_jax.huggingface.peft.names import embedding_factor_name
from tsd_jax.huggingface.peft.slots import (
    check_tied,
    full_params,
    full_tensors,
    slot,
    tied_error,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was read, ready for a spec.

    Attributes:
      kernels: {kernel path: {index of a stacked matrix, or None: its LoRA}}.
      scaling: of the rules, "lora" or "rslora".
      dropout: it was trained with.
      base_model: name or path of its base, or None.
      notes: what a user should know of how it was fitted in, one line each.
      full: {parameter path: {index of a stacked matrix, or None: its trained values}}.
    """

    kernels: Mapping[str, Mapping[StackIndex, PeftModule]]
    scaling: str
    dropout: float
    base_model: str | None
    notes: tuple[str, ...]
    full: Mapping[str, Mapping[StackIndex, FullTensor]] = dataclasses.field(
        default_factory=dict
    )

    def rules(
        self, *, directions: int = 8, dropout: float | None = None
    ) -> tuple[Rule | Full, ...]:
        """Return one rule for each kernel, with the adapter's rank, alpha and scaling.

        Where the layers of a stacked kernel differ, the largest rank and that layer's
        alpha are used. Full parameters have a rule each; for rows of an embedding it
        ranges from the first to the last.

        Args:
          directions: s, for the methods that have gains.
          dropout: in place of the adapter's own.
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
        rules += [full_rule(path, layers) for path, layers in self.full.items()]
        return tuple(rules)

    def start(
        self,
        key: jax.Array,
        spec: Spec,
        dtype: jnp.dtype = jnp.float32,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[Trainable, AllDirections]:
        """Return trainables that compute this adapter's function; directions are zero.

        The spec may have a larger rank, another scale and more kernels than the
        adapter. Additional columns of A are initialized as by `init`, beside zero rows
        of B: they add nothing, but train. Another scale is absorbed by B. Where only
        the spec has DoRA, magnitudes start at ||K + dK||, which changes nothing.

        Args:
          key: a JAX random key, for additional columns.
          spec: of `make_spec`, with any method; `rules` returns rules that fit.
          dtype: of all leaves.
          params: the base's tree, needed for full parameters and for DoRA.

        Raises:
          InputError: the spec lacks a parameter the adapter changes, has a smaller
            rank for it, another shape, or no DoRA where the adapter has it; or
            `params` is missing.
        """
        trainable, directions = init(key, spec, dtype, params=params)
        return self.put_into(trainable, spec, params=params), directions

    def put_into(
        self, trainable: Trainable, spec: Spec, *, params: Mapping[str, Any] | None
    ) -> Trainable:
        """Return trainables of a spec, as `init` made them, with this adapter in them.

        Args:
          trainable: of `init`.
          spec: of `make_spec`.
          params: the base's tree, needed for DoRA.

        Raises:
          InputError: as `start`.
        """
        trained = {*spec.paths, *(part.path for part in spec.full)}
        for path in (*self.kernels, *self.full):
            if path not in trained:
                raise InputError(
                    f"the adapter changes {path}, which the spec does not train: make "
                    "the spec with the adapter's rules"
                )
        adapters, full = dict(trainable.adapters), dict(trainable.full)
        for part in spec.full:
            start = np.asarray(full[part.path].value)
            value = filled(start, part, self.full.get(part.path, {}))
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
        return Trainable(adapters=adapters, full=full)


def from_peft(
    folder: str | Path,
    module_paths: Mapping[str, ParamSlot],
    tensor_paths: Mapping[str, ParamSlot] | None = None,
    params: Mapping[str, Any] | None = None,
) -> PeftAdapter:
    """Read a LoRA adapter that PEFT saved.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      module_paths: {torch module: (kernel path, index of its matrix or None)}; for the
        models here `tsd_jax.huggingface.module_paths` returns it.
      tensor_paths: {torch tensor: (parameter path, index of its matrix or None)}, for
        adapters with full parameters; `tsd_jax.huggingface.tensor_paths` returns it.
      params: the base's tree, for adapters that hold copies of the base's weights, as
        PEFT saves them of a resized vocabulary; it has that vocabulary already.

    Raises:
      InputError: a file is missing or damaged, the adapter is not a plain LoRA, or it
        changes a module or tensor that the model does not have; one line says which
        and why.
    """
    files = read_files(folder)
    full = full_tensors(files, tensor_paths, params)
    check_tied(files, full, tensor_paths)
    scaling = "rslora" if files.config.get("use_rslora") else "lora"
    kernels: dict[str, dict[StackIndex, PeftModule]] = {}
    notes: list[str] = []
    for name, module in modules_of(files).items():
        if embedding_factor_name(name, "A") in files.tensors:
            raise InputError(
                f"{folder} adapts {name}, an embedding, by LoRA, which the models here "
                "do not: export the adapter --to merged and start from that checkpoint"
            )
        if f"{name}.weight" == HEAD and name not in module_paths:
            raise tied_error(files.folder, name)
        path, index = slot(module_paths, name, f"{folder} adapts {name}", "module")
        limit = min(module.a.shape[0], module.b.shape[1])
        if module.rank > limit:
            notes.append(
                f"{name}: rank {module.rank} cut to {limit}, the limit of its kernel"
            )
            module = _cut(module, limit, scaling)
        kernels.setdefault(path, {})[index] = module
    for path, layers in kernels.items():
        stacked = len({slot for slot in module_paths.values() if slot[0] == path})
        notes += _notes(path, layers, stacked)
    for note in notes:
        _log.info("%s", note)
    return PeftAdapter(
        kernels=kernels,
        scaling=scaling,
        dropout=float(files.config.get("lora_dropout") or 0.0),
        base_model=files.config.get("base_model_name_or_path"),
        notes=tuple(notes),
        full=full_params(files, full, tensor_paths),
    )


def _cut(module: PeftModule, rank: int, scaling: str) -> PeftModule:
    """Return the same product with no more columns than its matrix can use."""
    down, up, _ = compress(Factors(module.a, module.b), rank).factors
    alpha = module.scale / SCALINGS[scaling](1.0, rank)
    scale = SCALINGS[scaling](alpha, rank)
    return PeftModule(down, up, alpha, scale, module.magnitude)


def _notes(
    path: str, layers: Mapping[StackIndex, PeftModule], stacked: int
) -> list[str]:
    """Return how the layers of a stacked kernel were brought to one shape."""
    notes = []
    ranks = {module.rank for module in layers.values()}
    if len(ranks) > 1:
        notes.append(
            f"{path}: its layers have ranks {sorted(ranks)}; all are padded to "
            f"{max(ranks)}, which does not change the function"
        )
    scales = {module.scale for module in layers.values()}
    if len(scales) > 1:
        notes.append(f"{path}: its layers have {len(scales)} scales; B absorbs them")
    bare = stacked - len(layers)
    if bare:
        notes.append(
            f"{path}: {bare} of {stacked} layers have no adapter; they get "
            "one that starts without effect"
        )
    return notes


def _fill(
    a: np.ndarray,
    b: np.ndarray,
    kernel: KernelSpec,
    layer: StackIndex,
    module: PeftModule,
) -> None:
    """Write one module's LoRA into a kernel's A and B."""
    position, stack = axis_indices(layer), kernel.batch_shape
    inside = all(n < size for n, size in zip(position, stack, strict=False))
    if len(position) != len(stack) or not inside:
        raise InputError(
            f"{kernel.path}: the adapter changes matrix {layer} of it, but the spec "
            f"stacks it as {stack}"
        )
    found = (module.a.shape[0], module.b.shape[1])
    if found != (kernel.fan_in, kernel.fan_out):
        raise InputError(
            f"{kernel.path} is (in, out) = {(kernel.fan_in, kernel.fan_out)}, but the "
            f"adapter's is {found}: it belongs to another base"
        )
    if module.rank > kernel.rank:
        raise InputError(
            f"{kernel.path}: the adapter has rank {module.rank}, but the spec only "
            f"{kernel.rank}: make the spec with the adapter's rules"
        )
    if module.magnitude is not None and not kernel.dora:
        raise InputError(
            f"{kernel.path}: the adapter has DoRA, but the spec has not: make the "
            "spec with the adapter's rules"
        )
    ratio = np.float64(module.scale) / kernel.scale
    a[(*position, slice(None), slice(module.rank))] = module.a
    b[(*position, slice(None))] = 0
    b[(*position, slice(module.rank))] = module.b * ratio


def _with_magnitudes(
    adapter: Adapter, layers: Mapping[StackIndex, PeftModule], base: jax.Array
) -> Adapter:
    """Return the adapter with its m, or with ||K + dK||, which changes nothing."""
    kernel = adapter.kernel
    up = kernel.scale * adapter.b
    magnitude = np.array(column_norms(base, adapter.a, up, layout=kernel.layout))
    for layer, module in layers.items():
        if module.magnitude is not None:
            magnitude[axis_indices(layer)] = module.magnitude
    return adapter.replace(magnitude=jnp.asarray(magnitude, adapter.a.dtype))
