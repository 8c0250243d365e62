"""The decoder families: their architecture, defaults, readers and writers.

A family is found by the `model_type` of a config.json. Its defaults are those of
transformers for fields that are absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsd_jax.huggingface.families.common import (
    same_names,
    write_chosen_windows,
    write_windows,
)
from tsd_jax.huggingface.families.family import Family
from tsd_jax.huggingface.families.gemma import (
    read_gemma2,
    read_gemma3,
    write_gemma2,
    write_gemma3,
)
from tsd_jax.huggingface.families.llama import (
    read_llama,
    read_ministral,
    read_mistral,
    read_mixtral,
    read_phi3,
    read_smollm3,
    write_mixtral,
    write_phi3,
    write_smollm3,
)
from tsd_jax.huggingface.families.qwen import (
    read_qwen2,
    read_qwen2_moe,
    read_qwen3,
    read_qwen3_moe,
    write_qwen2_moe,
    write_qwen3,
    write_qwen3_moe,
)


def _defaults(
    theta: float = 1e4, length: int = 32768, *, tied: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "rms_norm_eps": 1e-6,
        "rope_theta": theta,
        "max_position_embeddings": length,
        "tie_word_embeddings": tied,
        **more,
    }


_GEMMA: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN: Mapping[str, Any] = {"sliding_window": 4096, "max_window_layers": 28}

DECODERS: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _defaults(length=2048),
        read_llama,
        same_names("attention_bias", "mlp_bias"),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _defaults(length=131072, num_key_value_heads=8, sliding_window=4096),
        read_mistral,
        same_names("sliding_window"),
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        _defaults(length=131072, num_key_value_heads=8, sliding_window=4096),
        read_ministral,
        write_windows,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _defaults(1e6, 131072, num_key_value_heads=8)
        | {"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
        read_mixtral,
        write_mixtral,
        {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3"}
        | {"down_proj": "w2"},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _defaults(num_key_value_heads=32, **_QWEN),
        read_qwen2,
        write_chosen_windows,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _defaults(num_key_value_heads=32, head_dim=128, **_QWEN),
        read_qwen3,
        write_qwen3,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _defaults(num_key_value_heads=16, **_QWEN)
        | {"num_experts": 60, "num_experts_per_tok": 4}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        read_qwen2_moe,
        write_qwen2_moe,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _defaults(num_key_value_heads=4, sliding_window=4096)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        read_qwen3_moe,
        write_qwen3_moe,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _defaults(length=8192, tied=True, **_GEMMA)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        read_gemma2,
        write_gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _defaults(1e6, 131072, tied=True, rope_local_base_freq=1e4, **_GEMMA),
        read_gemma3,
        write_gemma3,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _defaults(length=4096, original_max_position_embeddings=4096)
        | {"rms_norm_eps": 1e-5},
        read_phi3,
        write_phi3,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _defaults(2e6, tied=True, num_key_value_heads=4, no_rope_layer_interval=4),
        read_smollm3,
        write_smollm3,
    ),
}
