"""Whether the config says what an adapter to start from is, and the flags that do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tsd_jax.app.model import Base
from tsd_jax.app.settings import AdapterSettings
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full, FullSpec
from tsd_jax.core.spec import SCALINGS, Rule, Spec
from tsd_jax.storage.adapter_file import SavedAdapter


def check_agreement(
    name: str,
    kernels: Mapping[str, Rule],
    full: Mapping[str, Full | FullSpec],
    settings: AdapterSettings,
    spec: Spec,
    base: Base,
) -> None:
    """Raise InputError unless the spec adapts just the kernels of an adapter.

    Args:
      name: of the adapter.
      kernels: {path: the adapter's own rule}.
      full: {path: what it has of a full parameter}.
      settings: of the config.
      spec: made of them.
      base: the model.
    """
    if not kernels:
        raise InputError(f"adapter.start: {name} adapts no kernel")
    largest = max(kernels.values(), key=lambda rule: rule.rank)
    wanted: dict[str, Any] = {"rank": largest.rank, "dora": largest.dora}
    # The scale alone matters, but alpha and scaling are what the config has.
    scale = SCALINGS[largest.scaling](largest.alpha, largest.rank)
    if SCALINGS[settings.scaling](settings.alpha, largest.rank) != scale:
        wanted |= {"alpha": largest.alpha, "scaling": largest.scaling}
    flags = {k: v for k, v in wanted.items() if getattr(settings, k) != v}
    if {*spec.paths} != {*kernels}:
        flags["pattern"] = _pattern(sorted(kernels))
    flags |= _missing_full(full, settings, spec, base)
    if flags:
        told = " ".join(f'--config.adapter.{k}="{v}"' for k, v in flags.items())
        raise InputError(
            f"adapter.start: {name} adapts other things than the config says: "
            f"add {told}"
        )


def _missing_full(
    full: Mapping[str, Full | FullSpec],
    settings: AdapterSettings,
    spec: Spec,
    base: Base,
) -> dict[str, Any]:
    """Return the settings that train what the adapter has in full and the spec lacks.

    Raises:
      InputError: it has rows of tokens that the model does not know.
    """
    trained = {part.path: part for part in spec.full}
    missing = {
        path: each
        for path, each in full.items()
        if path not in trained or not _covers(trained[path], each)
    }
    flags: dict[str, Any] = {}
    whole = sorted(path for path, each in missing.items() if each.rows is None)
    if whole:
        others = [settings.full_params] if settings.full_params else []
        flags["full_params"] = "|".join([*others, *map(re.escape, whole)])
    for path, each in missing.items():
        if each.rows is None:
            continue
        tokens = base.tokenizer.convert_ids_to_tokens(list(range(*each.rows)))
        if None in tokens:
            raise InputError(
                f"adapter.start has rows of {path} for tokens that the model does not "
                "know: name them in model.added_tokens, as its own run did"
            )
        flags["train_tokens"] = tuple(tokens)
    return flags


def _covers(part: FullSpec, each: Full | FullSpec) -> bool:
    """Return whether the values of an adapter fit what trains of a parameter."""
    if isinstance(each, FullSpec) or each.rows is None:
        return part.rows == each.rows
    if part.rows is None:
        return True
    return part.rows[0] <= each.rows[0] and each.rows[1] <= part.rows[1]


def _pattern(paths: Sequence[str]) -> str:
    """Return a short regular expression for just these paths of kernels."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        head, _, leaf = path.rpartition("/")
        owner, _, module = head.rpartition("/")
        grouped.setdefault((owner, leaf), []).append(module)
    parts = []
    for (owner, leaf), modules in grouped.items():
        names = "|".join(map(re.escape, modules))
        prefix = f"{re.escape(owner)}/" if owner else ""
        parts.append(f"{prefix}({names})/{re.escape(leaf)}")
    return "|".join(parts)


def rules_of(saved: SavedAdapter) -> tuple[dict[str, Rule], dict[str, FullSpec]]:
    """Return {path: rule} of a saved adapter's kernels, and its full parameters.

    Args:
      saved: of `load_adapter`.
    """
    kernels = {}
    for kernel in saved.spec.kernels:
        plain = SCALINGS["lora"](kernel.alpha, kernel.rank) == kernel.scale
        kernels[kernel.path] = Rule(
            pattern=re.escape(kernel.path),
            rank=kernel.rank,
            alpha=kernel.alpha,
            scaling="lora" if plain else "rslora",
            dora=kernel.dora,
        )
    return kernels, {part.path: part for part in saved.spec.full}
