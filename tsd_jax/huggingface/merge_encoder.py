"""Write an encoder and its head as one checkpoint, with an adapter merged into it.

A base may have no head, and no prefix to its names; what is written has both, as
AutoModelForSequenceClassification saves it. Encoders fit into memory whole.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsd_jax import huggingface
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.factors import Factors, require_finite
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.merge import BESIDE, check_folders
from tsd_jax.huggingface.tensors import read_json
from tsd_jax.models.encoder_config import PROBLEM_TYPES, EncoderConfig


@dataclasses.dataclass(frozen=True)
class Trained:
    """Hold what is merged: {torch module: dK} and {tensor: what trained whole}."""

    factors: Mapping[str, Factors]
    whole: Mapping[str, FullTensor]


def write_merged(
    out: Path,
    base: Path,
    config: EncoderConfig,
    trained: Trained,
    *,
    labels: Labels | None = None,
    dtype: DTypeLike | None = None,
) -> str:
    """Write the checkpoint; give the type of its weights, by name.

    Args:
      out: new, or empty; it appears when all of it is written.
      base: folder of the model. config: of its `read_config`.
      trained: what is merged.
      labels: of the head, where a run has noted them.
      dtype: of all weights; by default the base's own.

    Raises:
      InputError: the folder serves not, or the adapter is of another base.
    """
    check_folders(out, base)
    config = _with_labels(config, trained.whole, labels)
    new_head = _readout(config) in trained.whole
    params = huggingface.load_params(
        base, config, head_key=jax.random.key(0), new_head=new_head
    )
    merged = _merge(params, config, trained)
    stored = jnp.dtype(dtype or params["embeddings"]["LayerNorm"]["scale"].dtype)
    known = config_json(config, str(stored)).keys() | {"dtype"}
    found = read_json(base / "config.json")
    extra = {name: value for name, value in found.items() if name not in known}
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        huggingface.write_checkpoint(part, config, merged, dtype=stored, extra=extra)
        _copy_beside(base, part)
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return str(stored)


def _readout(config: EncoderConfig) -> str:
    return f"{huggingface.family_of(config).readout}.weight"


def _with_labels(
    config: EncoderConfig, whole: Mapping[str, FullTensor], labels: Labels | None
) -> EncoderConfig:
    """Return the config the head that was trained."""
    head = whole.get(_readout(config))
    if head is None:
        if not config.num_labels:
            raise InputError(
                "neither the base nor the adapter has a head: there is nothing to "
                "classify with"
            )
        return config
    count = len(head.value)
    if labels is not None and labels.count == count:
        return dataclasses.replace(
            config,
            num_labels=count,
            label_names=labels.names,
            problem_type=PROBLEM_TYPES[labels.problem],
        )
    if config.num_labels == count:
        return config
    problem = PROBLEM_TYPES["regression" if count == 1 else "classification"]
    return dataclasses.replace(
        config, num_labels=count, label_names=(), problem_type=problem
    )


def _merge(
    params: Mapping[str, Any], config: EncoderConfig, trained: Trained
) -> dict[str, Any]:
    """Add every dK and put in what trained whole; float32."""
    flat = {
        path: np.array(leaf, np.float32) for path, leaf in paths.flatten(params).items()
    }
    places = huggingface.tensor_paths(params, config.model_type)
    for name, pair in trained.factors.items():
        require_finite(pair)
        here = _place(flat, places, f"{name}.weight", pair.down @ pair.up)
        here[...] = pair.applied(here.T).T
    for name, each in trained.whole.items():
        if each.rows is not None:
            raise InputError(f"{name}: an encoder's rows are not merged here")
        path, _ = places.get(name, ("", None))
        value = each.value.T if path.endswith("/kernel") else each.value
        _place(flat, places, name, value)[...] = value
    return paths.unflatten(flat)


def _place(
    flat: Mapping[str, np.ndarray], places: Mapping[str, Any], name: str, like: Any
) -> np.ndarray:
    """Return the part of a parameter that a tensor stands for, to write to."""
    if name not in places:
        raise InputError(f"the base has no tensor {name!r}: it is another base")
    path, index = places[name]
    here = flat[path][... if index is None else index]
    if here.shape != like.shape:
        raise InputError(
            f"the base has {name!r} as {here.shape}, (in, out) of a matrix, and the "
            f"adapter is made for {like.shape}: it is another base"
        )
    return here


def _copy_beside(base: Path, part: Path) -> None:
    """Copy tokenizer and licence."""
    for file in sorted({file for each in BESIDE for file in base.glob(each)}):
        known = file.name in ("config.json", "adapter_config.json")
        if file.is_file() and not known and "safetensors" not in file.name:
            shutil.copyfile(file, part / file.name)
