"""PEFT's names, against those of published adapters."""

from __future__ import annotations

from tsd_jax.huggingface.peft import names


def test_names_are_those_of_a_published_adapter():
    module = "model.layers.0.self_attn.q_proj"
    stored = f"base_model.model.{module}"
    assert names.factor_name(module, "A") == f"{stored}.lora_A.weight"
    assert names.factor_name(module, "B") == f"{stored}.lora_B.weight"
    assert names.magnitude_name(module) == f"{stored}.lora_magnitude_vector"
    assert names.TRAINED_ROWS == "token_adapter.trainable_tokens_delta"
