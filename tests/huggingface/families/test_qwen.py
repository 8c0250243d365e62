from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.decoders import PUBLISHED
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families import qwen
from tsd_jax.huggingface.families.decoders import DECODERS
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.config import Experts


def fields(family: str, **changes) -> Fields:
    values = {**PUBLISHED[family], **changes}
    return Fields(Path("config.json"), values, DECODERS[family].defaults)


def test_the_last_layers_have_windows():
    values = qwen.read_qwen2(fields("qwen2", max_window_layers=3))
    assert values["window_layers"] == (False, False, False, True)
    assert "window_layers" not in qwen.read_qwen2(
        fields("qwen2", use_sliding_window=False)
    )


def test_windows_of_a_qwen2_with_experts_alternate():
    windows = {"use_sliding_window": True, "sliding_window": 5}
    values = qwen.read_qwen2_moe(fields("qwen2_moe", **windows, max_window_layers=3))
    assert values["window_layers"] == (True, False, True, False)


def test_biases_and_norms():
    assert qwen.read_qwen2(fields("qwen2"))["qkv_bias"] is True
    values = qwen.read_qwen3(fields("qwen3", attention_bias=True))
    assert (values["attention_bias"], values["qk_norm"]) == (True, True)


def test_experts_under_both_names():
    want = Experts(5, 2, 20, norm_topk_prob=True)
    values = qwen.read_qwen3_moe(fields("qwen3_moe"))
    assert values["experts"] == want
    values = qwen.read_qwen3_moe(
        fields("qwen3_moe", num_experts=None, num_local_experts=5)
    )
    assert values["experts"] == want
    shared = qwen.read_qwen2_moe(fields("qwen2_moe"))["experts"]
    assert shared.shared_intermediate_size == 28


def test_layers_without_experts_are_refused():
    with pytest.raises(InputError, match="mlp_only_layers"):
        qwen.read_qwen3_moe(fields("qwen3_moe", mlp_only_layers=[1]))
