"""Checkpoints that do not hold the model of their config are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.decoders import PUBLISHED, write_decoder
from tsd_jax import huggingface
from tsd_jax.core.errors import InputError

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def llama(**changes: Any) -> dict[str, Any]:
    return PUBLISHED["llama"] | changes


def without(tensors):
    del tensors[UP]


def with_another(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)


def turned(tensors):
    tensors[UP] = np.ascontiguousarray(tensors[UP].T)


def of_integers(tensors):
    tensors[UP] = tensors[UP].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "named", "way_out"),
    [
        (without, f"lacks tensor '{UP}'", "fetch weights and config of one model"),
        (with_another, "holds tensor 'model.layers.0.self_attn.q_proj.bias'", "fetch"),
        (turned, f"tensor '{UP}' with shape (32, 48)", "config.json asks for (48, 32)"),
        (of_integers, f"tensor '{UP}' as I8", "use one of F64, F32, F16, BF16"),
    ],
)
def test_headers(tmp_path, change, named, way_out):
    write_decoder(tmp_path, PUBLISHED["llama"])
    config = huggingface.read_config(tmp_path)
    huggingface.check_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    for look in (huggingface.check_checkpoint, huggingface.load_params):
        with pytest.raises(InputError) as caught:
            look(tmp_path, config)
        line = str(caught.value)
        assert named in line
        assert way_out in line
        assert "\n" not in line


def test_a_tied_head_of_its_own(tmp_path):
    write_decoder(tmp_path, llama(tie_word_embeddings=True))
    config = huggingface.read_config(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    assert "lm_head" not in huggingface.load_params(tmp_path, config)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"lm_head.weight.*set that to false"):
        huggingface.load_params(tmp_path, config)
