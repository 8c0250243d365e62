from __future__ import annotations

import re

import numpy as np
import pytest

from tsd_jax.huggingface.full_tensors import FullTensor
from tsd_jax.huggingface.peft.config import adapter_config

RANKS = {"model.layers.1.q": 4, "model.layers.11.q": 4, "model.layers.2.q": 6}


def config(ranks, tensors=None, **changes):
    given = {"default_rank": 4, "base_model": "org/base", "dora": False}
    given |= {"task_type": "CAUSAL_LM", **changes}
    return adapter_config(ranks, {"q"}, tensors or {}, **given)


def test_alpha_is_the_rank():
    found = config(RANKS, dora=True, task_type="SEQ_CLS")
    assert (found["r"], found["lora_alpha"]) == (4, 4)
    assert found["rank_pattern"] == found["alpha_pattern"] == {"model.layers.2.q": 6}
    assert (found["use_dora"], found["task_type"]) == (True, "SEQ_CLS")
    assert (found["target_modules"], found["base_model_name_or_path"]) == (
        ["q"],
        "org/base",
    )
    assert found["modules_to_save"] is None
    assert found["trainable_token_indices"] is None


@pytest.mark.parametrize(
    "ranks", [RANKS, {"q": 6, "a.q": 4}, {"a.q": 6, "b.a.q": 4, "axq": 4}]
)
def test_each_module_finds_its_rank_as_peft_looks_it_up(ranks):
    patterns = config(ranks)["rank_pattern"]
    for name, rank in ranks.items():
        fitting = [k for k in patterns if re.match(rf"(.*\.)?({k})$", name)]
        assert (patterns[fitting[0]] if fitting else 4) == rank


def test_full_tensors_are_modules_or_rows():
    tensors = [
        FullTensor("model.norm", "weight", np.zeros(3)),
        FullTensor("classifier.dense", "weight", np.zeros((3, 3))),
        FullTensor("classifier.out_proj", "bias", np.zeros(3)),
        FullTensor("model.embed_tokens", "weight", np.zeros((2, 3)), (5, 6)),
    ]
    found = config(RANKS, {each.name: each for each in tensors})
    assert found["modules_to_save"] == ["classifier", "model.norm"]
    assert found["trainable_token_indices"] == {"model.embed_tokens": [5, 6]}
