"""Well-known checkpoints: their config.json is read, and gives as many parameters."""

from __future__ import annotations

import json
import math

import pytest

from tests.helpers.published import CHECKPOINTS
from tsd_jax.huggingface import abstract_params, names, read_config
from tsd_jax.huggingface.config import config_json
from tsd_jax.huggingface.families.family import DECODER
from tsd_jax.huggingface.families.registry import FAMILIES


def test_every_family_is_published():
    found = {each.config["model_type"] for each in CHECKPOINTS.values()}
    decoders = {name for name, each in FAMILIES.items() if each.kind is DECODER}
    assert found == decoders - {"ministral"}  # whose files are gated


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_as_many_parameters_as_published(tmp_path, name):
    published = CHECKPOINTS[name]
    (tmp_path / "config.json").write_text(json.dumps(dict(published.config)))
    config = read_config(tmp_path)
    shapes = names.flatten(abstract_params(config))
    found = sum(math.prod(leaf.shape) for leaf in shapes.values())
    assert found == published.parameters
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, "bfloat16")))
    assert read_config(tmp_path) == config
