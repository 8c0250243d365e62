"""Encoders are those of transformers over a spread of configs, not one alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.encoders import PUBLISHED, inputs
from tsd_jax import huggingface

torch = pytest.importorskip("torch")
from tests.helpers.stock import stock_model
from tests.interop.test_encoders_interop import (
    TOLERANCE,
    our_logits,
    random_torch_model,
)

NAMES = {"bert": 8, "roberta": 8, "deberta-v3": 10, "deberta-v2": 5}


@st.composite
def bert_like(draw):
    """What BERT and RoBERTa may say."""
    heads = draw(st.integers(1, 4))
    width = heads * draw(st.sampled_from([5, 8, 12]))
    labels = draw(st.integers(1, 4))
    return {
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": draw(st.integers(9, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.sampled_from([67, 70, 101])),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 1e-3])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "max_position_embeddings": draw(st.integers(30, 50)),
        "pad_token_id": draw(st.sampled_from([0, 1, 2])),
        "id2label": {str(n): f"label {n}" for n in range(labels)},
    }


@st.composite
def deberta_like(draw):
    """What a DeBERTa may say beyond that."""
    content = draw(bert_like())
    absolute = draw(st.booleans())
    buckets = draw(st.sampled_from([-1, 4, 7, 16, 32]))
    furthest = st.sampled_from([5, 11, 40] if buckets < 0 else [-1, 40])
    return content | {
        "type_vocab_size": draw(st.sampled_from([0, 2])),
        "pos_att_type": draw(st.sampled_from(["c2p", "p2c", "p2c|c2p", ["c2p"]])),
        "share_att_key": draw(st.booleans()),
        "position_buckets": buckets,
        "max_relative_positions": draw(furthest),
        "norm_rel_ebd": draw(st.sampled_from(["none", "layer_norm"])),
        "position_biased_input": absolute,
        "embedding_size": draw(st.sampled_from([content["hidden_size"], 20])),
        "pooler_hidden_size": content["hidden_size"],
        "pooler_hidden_act": draw(st.sampled_from(["gelu", "tanh"])),
    }


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(tmp_path_factory, name):
    deberta = name.startswith("deberta")
    drawn = deberta_like() if deberta else bert_like()

    @settings(
        max_examples=NAMES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes=drawn, padded=st.booleans(), offset=st.integers(0, 9))
    def check(changes, padded, offset):
        content = {**PUBLISHED[name], **changes}
        if name == "deberta-v2":
            content["attention_head_size"] = (
                content["hidden_size"] // content["num_attention_heads"]
            )
        model, saved = stock_model(
            content, tmp_path_factory.mktemp("model"), random_torch_model
        )
        config = huggingface.read_config(saved)
        params = huggingface.load_params(saved, config)

        tokens, mask, types = inputs(content)
        # Positions of a call of one's own; the relative ones have no such thing.
        positions = None
        if not deberta and offset:
            positions = np.broadcast_to(
                offset + np.arange(tokens.shape[1]), tokens.shape
            )
        given = {"token_type_ids": types, "position_ids": positions}
        if padded:
            given["attention_mask"] = mask.astype(int)
        arrays = {
            key: torch.from_numpy(np.array(value))
            for key, value in given.items()
            if value is not None
        }
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens), **arrays)[0].numpy()
        found = our_logits(
            config, params, tokens, positions, mask if padded else None, types
        )
        assert expected.shape == (3, len(content["id2label"]))
        assert np.abs(expected).max() > 0.05
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)

    check()
