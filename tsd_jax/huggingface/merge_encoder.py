"""Write an encoder and its head as one checkpoint, with an adapter merged into it.

A base may lack the head, and the prefix of its names; what is written has both, as
AutoModelForSequenceClassification saves it. Encoders are small: this works in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.data.classification import Labels
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.factors import Factors, require_finite
from tsd_jax.huggingface.families.registry import family_of
from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.load import load_params
from tsd_jax.huggingface.model_folder import (
    CONFIG_FILE,
    check_new_folder,
    copy_companions,
    staged_folder,
)
from tsd_jax.huggingface.names import (
    ParamSlot,
    axis_indices,
    is_transposed,
    tensor_paths,
)
from tsd_jax.huggingface.save import write_checkpoint
from tsd_jax.models.encoder_config import PROBLEM_TYPES, EncoderConfig
from tsd_jax.storage.atomic import read_json


@dataclasses.dataclass(frozen=True)
class Trained:
    """What is merged into a base.

    Attributes:
      factors: {torch module: dK of it}.
      full: {torch tensor: its trained values}.
    """

    factors: Mapping[str, Factors]
    full: Mapping[str, FullTensor]


def write_merged(
    out: Path,
    base: Path,
    config: EncoderConfig,
    trained: Trained,
    *,
    labels: Labels | None = None,
    dtype: DTypeLike | None = None,
) -> str:
    """Write the merged checkpoint; return the dtype of its weights, by name.

    Args:
      out: new or empty; it appears when everything is written.
      base: folder of the model.
      config: of the base, by `read_config`.
      trained: what is merged.
      labels: of the head, where a run has recorded them.
      dtype: of all weights; by default the base's own.

    Raises:
      InputError: `out` cannot be written, or the adapter is for another base.
    """
    check_new_folder(out, base)
    config = _with_labels(config, trained.full, labels)
    new_head = _readout(config) in trained.full
    params = load_params(base, config, head_key=jax.random.key(0), new_head=new_head)
    merged = _merge(params, config, trained)
    stored = jnp.dtype(dtype or params["embeddings"]["LayerNorm"]["scale"].dtype)
    known = config_json(config, str(stored)).keys() | {"dtype"}
    found = read_json(base / CONFIG_FILE)
    extra = {name: value for name, value in found.items() if name not in known}
    with staged_folder(out) as part:
        copy_companions(base, part)
        write_checkpoint(part, config, merged, dtype=stored, extra=extra)
    return str(stored)


def _readout(config: EncoderConfig) -> str:
    return f"{family_of(config).readout}.weight"


def _with_labels(
    config: EncoderConfig, full: Mapping[str, FullTensor], labels: Labels | None
) -> EncoderConfig:
    """Return the config for the labels of the trained head."""
    head = full.get(_readout(config))
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
    """Return the parameters with every change in them, in float32."""
    flat = {
        path: np.array(leaf, np.float32) for path, leaf in paths.flatten(params).items()
    }
    slots = tensor_paths(params, config.model_type)
    for name, pair in trained.factors.items():
        require_finite(pair, name)
        here = _matrix(flat, slots, f"{name}.weight", pair.down @ pair.up)
        here[...] = pair.applied(here.T).T
    for name, each in trained.full.items():
        if each.rows is not None:
            raise InputError(f"{name}: rows of an encoder's tensor cannot be merged")
        path, _ = slots.get(name, ("", None))
        value = each.value.T if is_transposed(path) else each.value
        _matrix(flat, slots, name, value)[...] = value
    return paths.unflatten(flat)


def _matrix(
    flat: Mapping[str, np.ndarray],
    slots: Mapping[str, ParamSlot],
    name: str,
    like: np.ndarray,
) -> np.ndarray:
    """Return a view of the values that a torch tensor has here, to write to."""
    if name not in slots:
        raise InputError(
            f"the base has no tensor {name!r}: give the base that was trained on"
        )
    path, index = slots[name]
    here = flat[path][axis_indices(index)]
    if here.shape != like.shape:
        raise InputError(
            f"the base has {name!r} as {here.shape}, (in, out) of a matrix, but the "
            f"adapter needs {like.shape}: give the base that was trained on"
        )
    return here
