"""The library's own adapter file: all that resuming or swapping adapters needs.

One safetensors file. Its tensors are the leaves of the adapters and directions under
"<path>/<leaf>", its metadata a format name, a version and a JSON object:

    {"method": {...}, "kernels": [{...}, ...], "whole": [{...}, ...],
     "launched": true, "base_model": "...", "base_revision": "...", "base": {...}}

with the fields of `Method`, `KernelSpec`, `FullSpec` and `BaseFacts` as they are;
"whole" lists the full parameters. Version 1, which had none, is still read, and so are
files without "base" or "base_revision".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tsd_jax.core.adapter import (
    Adapter,
    AllDirections,
    Directions,
    Trainable,
)
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.core.layout import Layout
from tsd_jax.core.leaves import leaf_shapes, leaf_specs
from tsd_jax.core.methods import Method
from tsd_jax.core.spec import KernelSpec, Spec
from tsd_jax.storage.tensors import read_tensors, write_tensors

FORMAT = "tsd_jax adapter"
VERSION = 2
_INDICES = "indices"
# A setting of training alone, which may differ between the file and the given spec.
_FREE = ("dropout", "calls")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class BaseFacts:
    """What an export needs to know of the base model.

    Attributes:
      model_type: its family.
      peft_task: PEFT's name for what the family does.
      tied: whether its head is its embedding.
    """

    model_type: str
    peft_task: str
    tied: bool


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter file.

    Attributes:
      trainable: what trains.
      directions: {kernel path: Directions}.
      spec: of the file, or the one given to `load_adapter`.
      launched: whether launch has happened.
      indices: {kernel path: launched directions, (*batch, c), int32}, or None.
      base_model: name or path of the base, or None.
      base: what is known of it, or None.
      base_revision: of the base on the hub, or None.
    """

    trainable: Trainable
    directions: AllDirections
    spec: Spec
    launched: bool
    indices: dict[str, np.ndarray] | None
    base_model: str | None
    base: BaseFacts | None = None
    base_revision: str | None = None


def save_adapter(
    file: str | Path,
    trainable: Trainable,
    directions: Mapping[str, Directions],
    spec: Spec,
    *,
    launched: bool,
    indices: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base: BaseFacts | None = None,
    base_revision: str | None = None,
) -> None:
    """Write adapters, directions and their spec into one file, bit for bit.

    The file appears complete or not at all: after a failure an older one of that name
    is untouched.

    Args:
      file: by convention NAME.safetensors; its folder must exist.
      trainable: on this host.
      directions: {kernel path: Directions}.
      spec: of `make_spec`.
      launched: whether `launch` has been called on them.
      indices: {kernel path: Ranking.indices}, kept for the record.
      base_model: name or path of the base model.
      base: what an export needs to know of it.
      base_revision: branch, tag or commit of the base on the hub.

    Raises:
      InputError: adapters or directions are not those of the spec, or the file
        cannot be written.
    """
    tensors = dict(_leaves(trainable, directions))
    for path, kept in (indices or {}).items():
        tensors[f"{path}/{_INDICES}"] = np.asarray(kept, np.int32)
    _check(tensors, spec, "the adapters do not fit the spec")
    facts = {
        "method": dataclasses.asdict(spec.method),
        "kernels": [_kernel_facts(kernel) for kernel in spec.kernels],
        "whole": [dataclasses.asdict(each) for each in spec.full],
        "launched": bool(launched),
        "base_model": base_model,
        "base_revision": base_revision,
    }
    if base is not None:
        facts["base"] = dataclasses.asdict(base)
    metadata = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps(facts)}
    try:
        write_tensors(Path(file), tensors, metadata)
    except OSError as error:
        raise InputError(
            f"cannot write {file} ({error.strerror}): give a file in an existing folder"
        ) from error


def load_adapter(file: str | Path, spec: Spec | None = None) -> SavedAdapter:
    """Read what `save_adapter` wrote.

    Adapters of one spec have one tree structure and one set of shapes: a function
    jitted over them takes any of them without being compiled again.

    Args:
      file: of `save_adapter`.
      spec: that the file must fit, but for dropout, which is taken from it. Without one
        the spec is rebuilt from the file.

    Raises:
      InputError: the file is missing, damaged, not an adapter file or of a newer
        version, or does not fit `spec`; the line says which, or what differs first.
    """
    file = Path(file)
    tensors, metadata = read_tensors(file)
    facts = _facts(file, metadata)
    try:
        saved = _spec(facts)
        _check(tensors, saved, "tensors and header disagree")
        launched, base_model = bool(facts["launched"]), facts["base_model"]
        base = _build(BaseFacts, facts["base"]) if "base" in facts else None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{file} is damaged ({error}): write it again") from error
    different = None if spec is None else _difference(saved, spec)
    if different:
        raise InputError(f"{file} does not fit: {different}")
    trainable, directions = _trees(file, tensors, spec or saved)
    return SavedAdapter(
        trainable=trainable,
        directions=directions,
        spec=spec or saved,
        launched=launched,
        indices=_indices(tensors, saved),
        base_model=base_model,
        base=base,
        base_revision=facts.get("base_revision"),
    )


def _leaves(
    trainable: Trainable, directions: Mapping[str, Directions]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every leaf that is not None with its name in the file."""
    for trees in (trainable.adapters, directions):
        for path, tree in trees.items():
            for name in leaf_specs(tree):
                leaf = getattr(tree, name)
                if leaf is not None:
                    yield f"{path}/{name}", np.asarray(leaf)
    for path, part in trainable.full.items():
        yield f"{path}/value", np.asarray(part.value)


def _wanted(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return {name in the file: shape} of every leaf that a spec has."""
    wanted = {f"{part.path}/value": part.value_shape for part in spec.full}
    for kernel in spec.kernels:
        for kind in (Adapter, Directions):
            shapes = leaf_shapes(kind, kernel)
            wanted |= {f"{kernel.path}/{name}": s for name, s in shapes.items()}
    return wanted


def _check(tensors: Mapping[str, np.ndarray], spec: Spec, fault: str) -> None:
    """Raise InputError unless the tensors are the leaves of the spec."""
    wanted = _wanted(spec)
    for kernel in spec.kernels:
        name = f"{kernel.path}/{_INDICES}"
        if name in tensors:
            wanted[name] = (*kernel.batch_shape, kernel.ranked)
    for name in sorted(wanted.keys() | tensors.keys()):
        here = tensors[name].shape if name in tensors else "nothing"
        there = wanted.get(name, "nothing")
        if here != there:
            raise InputError(f"{fault}: {name} is {here}, the spec has {there}")
        kind = jnp.integer if name.endswith(f"/{_INDICES}") else jnp.floating
        if not jnp.issubdtype(tensors[name].dtype, kind):
            raise InputError(f"{fault}: {name} has dtype {tensors[name].dtype}")


def _facts(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the header, refusing other formats and newer versions."""
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file} is not an adapter file of tsd_jax; from_peft reads PEFT adapters"
        )
    version = metadata.get("version", "")
    if version.isdigit() and int(version) > VERSION:
        raise InputError(
            f"{file} has format version {version}, and this tsd_jax reads up to "
            f"{VERSION}: update tsd_jax"
        )
    try:
        facts = json.loads(metadata["facts"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged (its header): write it again") from error
    if not version.isdigit() or int(version) < 1 or not isinstance(facts, dict):
        raise InputError(f"{file} is damaged (its header): write it again")
    return facts


def _spec(facts: Mapping[str, Any]) -> Spec:
    """Build the spec that a header describes."""
    kernels = tuple(_kernel(each) for each in facts["kernels"])
    for kernel in kernels:
        kernel.layout.validate(kernel.path, len(kernel.shape))
    full = tuple(_build(FullSpec, each) for each in facts.get("whole", ()))
    return Spec(kernels, _build(Method, facts["method"]), full)


def _build(kind: type[T], facts: Mapping[str, Any]) -> T:
    """Build a dataclass from JSON values; lists become tuples."""
    return kind(**{name: _tupled(value) for name, value in facts.items()})


def _kernel_facts(kernel: KernelSpec) -> dict[str, Any]:
    """Return what a file holds of a kernel's description: all but the model's calls."""
    facts = dataclasses.asdict(dataclasses.replace(kernel, calls=()))
    del facts["calls"]
    return facts


def _kernel(facts: Mapping[str, Any]) -> KernelSpec:
    return _build(KernelSpec, {**facts, "layout": _build(Layout, facts["layout"])})


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _difference(saved: Spec, given: Spec) -> str | None:
    """Return what differs first, in words; None if nothing does."""
    if saved.method != given.method:
        return f"it was saved for {saved.method}, the spec has {given.method}"
    for kind, ours, others in (
        ("kernel", saved.kernels, given.kernels),
        ("full parameter", saved.full, given.full),
    ):
        mine, theirs = ({each.path: each for each in some} for some in (ours, others))
        different = _first_difference(kind, mine, theirs)
        if different:
            return different
    return None


def _first_difference(
    kind: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> str | None:
    """Return where two {path: static description} differ first; None if nowhere."""
    for path in sorted(mine.keys() ^ theirs.keys()):
        missing = "the file has no" if path in theirs else "the spec has no"
        return f"{missing} {kind} {path!r}"
    for path, kernel in mine.items():
        for field in dataclasses.fields(kernel):
            here, there = (getattr(each, field.name) for each in (kernel, theirs[path]))
            if here != there and field.name not in _FREE:
                return f"{path}: {field.name} is {here}, the spec has {there}"
    return None


def _trees(
    file: Path, tensors: Mapping[str, np.ndarray], spec: Spec
) -> tuple[Trainable, AllDirections]:
    """Rebuild the trees from their leaves."""

    def leaf(path: str, name: str) -> jax.Array | None:
        stored = tensors.get(f"{path}/{name}")
        if stored is None:
            return None
        if jax.dtypes.canonicalize_dtype(stored.dtype) != stored.dtype:
            raise InputError(
                f"{file} stores {stored.dtype}, which JAX would round here: set "
                "jax_enable_x64"
            )
        return jnp.asarray(stored)

    full = {part.path: FullParam(leaf(part.path, "value"), part) for part in spec.full}
    adapters: dict[str, Adapter] = {}
    directions: AllDirections = {}
    for kernel in spec.kernels:
        trained, frozen = (
            {name: leaf(kernel.path, name) for name in leaf_specs(kind)}
            for kind in (Adapter, Directions)
        )
        adapters[kernel.path] = Adapter(**trained, kernel=kernel)
        directions[kernel.path] = Directions(**frozen)
    return Trainable(adapters=adapters, full=full), directions


def _indices(
    tensors: Mapping[str, np.ndarray], spec: Spec
) -> dict[str, np.ndarray] | None:
    found = {
        path: tensors[f"{path}/{_INDICES}"]
        for path in spec.paths
        if f"{path}/{_INDICES}" in tensors
    }
    return found or None
