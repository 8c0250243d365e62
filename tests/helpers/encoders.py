"""Small encoders of every family: config.json as published, and random weights."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.decoders import write_model

_SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 40,
    "initializer_range": 0.02,
    "id2label": {"0": "bad", "1": "good", "2": "odd"},
    "label2id": {"bad": 0, "good": 1, "odd": 2},
}


def _published(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForSequenceClassification"],
        "model_type": model_type,
        **_SIZES,
        **more,
    }


_DEBERTA = {
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "relative_attention": True,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "position_buckets": 8,
    "share_att_key": True,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 32,
    "pad_token_id": 0,
}

# {name: config.json}; the v2 of the authors has a convolution, their v3 has none.
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "bert": _published(
        "Bert", "bert", layer_norm_eps=1e-12, type_vocab_size=2, pad_token_id=0
    ),
    "roberta": _published(
        "Roberta", "roberta", layer_norm_eps=1e-5, type_vocab_size=1, pad_token_id=1
    ),
    "deberta-v3": _published("DebertaV2", "deberta-v2", **_DEBERTA),
    "deberta-v2": _published(
        "DebertaV2",
        "deberta-v2",
        **_DEBERTA,
        conv_kernel_size=3,
        conv_act="gelu",
        attention_head_size=8,
    ),
}


def _random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor by its name; what ends in a tanh must not saturate."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    ends = "pooler" in name or "classifier.dense" in name
    mean = 1.0 if name.endswith("LayerNorm.weight") else 0.0
    values = (0.15 if ends else 0.4) * rng.standard_normal(shape)
    return (values + mean).astype(np.float32)


def write_encoder(folder: Path, published: Mapping[str, Any]) -> None:
    """Write config.json and random weights, named as in the family's files."""
    write_model(folder, published, _random_tensor)


def inputs(
    published: Mapping[str, Any], length: int = 18
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, mask and token types (3, T): padded left, right and not."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 67, size=(3, length))
    mask = np.ones(tokens.shape, bool)
    mask[0, : length // 3] = mask[1, -length // 4 :] = False
    tokens[~mask] = published["pad_token_id"]
    types = rng.integers(0, max(published["type_vocab_size"], 1), size=tokens.shape)
    return tokens, mask, types
