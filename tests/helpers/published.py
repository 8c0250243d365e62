"""What the config.json of well-known checkpoints says, and how large the models are.

Only the fields that shape a model, with the values known of them.
Counts are of parameters, a tied head once: those of transformers' own models. The
factors of longrope are made up, for only their number shapes a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Published(NamedTuple):
    """Hold one config.json and its number of parameters."""

    config: Mapping[str, Any]
    parameters: int


def _config(
    architecture: str,
    model_type: str,
    sizes: tuple[int, int, int, int, int, int],
    length: int,
    **more: Any,
) -> dict[str, Any]:
    """Return the common entries; sizes are V, D, width, layers, heads, key heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": model_type,
        **dict(zip(names, sizes, strict=True)),
        "max_position_embeddings": length,
        "torch_dtype": "bfloat16",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **more,
    }


def _llama(sizes: tuple[int, int, int, int, int, int], length: int, **more: Any):
    settings = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "pretraining_tp": 1}
    settings |= {"tie_word_embeddings": False, "rope_scaling": None} | more
    return _config("Llama", "llama", sizes, length, **settings)


def _llama3(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    more = {"rope_theta": 500000.0, "rope_scaling": scaling}
    return more | {"attention_bias": False, "mlp_bias": False}


def _mistral(sizes: tuple[int, int, int, int, int, int], length: int, **more: Any):
    settings = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    settings |= {"sliding_window": None, "tie_word_embeddings": False} | more
    return _config("Mistral", "mistral", sizes, length, **settings)


def _mixtral(sizes: tuple[int, int, int, int, int, int], length: int):
    return _config(
        "Mixtral",
        "mixtral",
        sizes,
        length,
        hidden_act="silu",
        num_experts_per_tok=2,
        num_local_experts=8,
        output_router_logits=False,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
    )


def _qwen(
    version: str,
    sizes: tuple[int, int, int, int, int, int],
    length: int,
    *,
    windowed_from: int,
    tied: bool,
    **more: Any,
):
    settings = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    settings |= {"sliding_window": None, "use_sliding_window": False}
    settings |= {"max_window_layers": windowed_from, "tie_word_embeddings": tied}
    family = f"qwen{version.lower()}" if "M" not in version else f"qwen{version[0]}_moe"
    return _config(f"Qwen{version}", family, sizes, length, **settings | more)


def _qwen3(sizes: tuple[int, int, int, int, int, int], *, tied: bool):
    settings: dict[str, Any] = {"head_dim": 128, "attention_bias": False}
    settings |= {"rope_scaling": None, "windowed_from": sizes[3], "tied": tied}
    return _qwen("3", sizes, 40960, **settings)


def _gemma2(
    sizes: tuple[int, int, int, int, int, int], head_dim: int = 256, scalar: int = 256
):
    return _config(
        "Gemma2",
        "gemma2",
        sizes,
        8192,
        attention_bias=False,
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=scalar,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        sliding_window=4096,
    )


def _gemma3(sizes: tuple[int, int, int, int, int, int], **more: Any):
    return _config(
        "Gemma3",
        "gemma3_text",
        sizes,
        32768,
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        **more,
    )


def _phi3(
    sizes: tuple[int, int, int, int, int, int],
    length: int,
    trained: int = 4096,
    **more: Any,
):
    settings = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    settings |= {"original_max_position_embeddings": trained, "rope_scaling": None}
    settings |= {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    settings |= {"tie_word_embeddings": False, "auto_map": {"AutoConfig": "x.Phi3"}}
    return _config("Phi3", "phi3", sizes, length, **settings | more)


def _longrope(pairs: int) -> dict[str, Any]:
    """Stand for the published factors, which are as many numbers that rise."""
    short = [1.0 + n / pairs for n in range(pairs)]
    long = [1.0 + 60 * n / pairs for n in range(pairs)]
    return {"type": "longrope", "short_factor": short, "long_factor": long}


_PHI4 = {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}
_PHI4 |= {"sliding_window": 262144, "rope_scaling": _longrope(48)}
_QWEN2_MOE = {"decoder_sparse_step": 1, "num_experts_per_tok": 4}
_QWEN2_MOE |= {"norm_topk_prob": False, "moe_intermediate_size": 1408}
_QWEN2_MOE |= {"shared_expert_intermediate_size": 5632, "num_experts": 60}
_QWEN3_MOE = {"attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128}
_QWEN3_MOE |= {"mlp_only_layers": [], "norm_topk_prob": True, "rope_scaling": None}
_QWEN3_MOE |= {"num_experts": 128, "num_experts_per_tok": 8}
_GEMMA3_NEW = {
    "_sliding_window_pattern": 6,
    "layer_types": [
        "full_attention" if n % 6 == 5 else "sliding_attention" for n in range(18)
    ],
    "use_bidirectional_attention": False,
}
_SMOLLM3 = {
    "attention_bias": False,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [int(n % 4 != 3) for n in range(36)],
    "pretraining_tp": 2,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}

CHECKPOINTS: Mapping[str, Published] = {
    "Llama-2-7b": Published(
        _llama((32000, 4096, 11008, 32, 32, 32), 4096), 6_738_415_616
    ),
    "TinyLlama-1.1B": Published(
        _llama((32000, 2048, 5632, 22, 32, 4), 2048), 1_100_048_384
    ),
    "Llama-3.1-8B": Published(
        _llama((128256, 4096, 14336, 32, 32, 8), 131072, **_llama3(8.0)), 8_030_261_248
    ),
    "Llama-3.1-70B": Published(
        _llama((128256, 8192, 28672, 80, 64, 8), 131072, **_llama3(8.0)), 70_553_706_496
    ),
    "Llama-3.2-1B": Published(
        _llama((128256, 2048, 8192, 16, 32, 8), 131072, **_llama3(32.0), head_dim=64)
        | {"tie_word_embeddings": True},
        1_235_814_400,
    ),
    "Llama-3.2-3B": Published(
        _llama((128256, 3072, 8192, 28, 24, 8), 131072, **_llama3(32.0), head_dim=128)
        | {"tie_word_embeddings": True},
        3_212_749_824,
    ),
    "SmolLM-135M": Published(
        _llama((49152, 576, 1536, 30, 9, 3), 2048, tie_word_embeddings=True),
        134_515_008,
    ),
    "SmolLM2-360M": Published(
        _llama((49152, 960, 2560, 32, 15, 5), 8192, rope_theta=100000)
        | {"is_llama_config": True, "rope_interleaved": False}
        | {"tie_word_embeddings": True},
        361_821_120,
    ),
    "Mistral-7B-v0.1": Published(
        _mistral((32000, 4096, 14336, 32, 32, 8), 32768, rope_theta=10000.0)
        | {"sliding_window": 4096},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": Published(
        _mistral((32768, 4096, 14336, 32, 32, 8), 32768), 7_248_023_552
    ),
    "Mistral-Nemo-12B": Published(
        _mistral((131072, 5120, 14336, 40, 32, 8), 131072, head_dim=128),
        12_247_782_400,
    ),
    "Mixtral-8x7B": Published(
        _mixtral((32000, 4096, 14336, 32, 32, 8), 32768), 46_702_792_704
    ),
    "Qwen2.5-0.5B": Published(
        _qwen("2", (151936, 896, 4864, 24, 14, 2), 32768, windowed_from=24, tied=True)
        | {"sliding_window": 32768, "use_mrope": False},
        494_032_768,
    ),
    "Qwen2.5-1.5B": Published(
        _qwen("2", (151936, 1536, 8960, 28, 12, 2), 131072, windowed_from=28, tied=True)
        | {"sliding_window": 131072},
        1_543_714_304,
    ),
    "Qwen2.5-7B": Published(
        _qwen(
            "2", (152064, 3584, 18944, 28, 28, 4), 32768, windowed_from=28, tied=False
        )
        | {"sliding_window": 131072},
        7_615_616_512,
    ),
    "Qwen2.5-72B": Published(
        _qwen(
            "2", (152064, 8192, 29568, 80, 64, 8), 32768, windowed_from=70, tied=False
        )
        | {"sliding_window": 131072},
        72_706_203_648,
    ),
    "Qwen3-0.6B": Published(
        _qwen3((151936, 1024, 3072, 28, 16, 8), tied=True), 596_049_920
    ),
    "Qwen3-8B": Published(
        _qwen3((151936, 4096, 12288, 36, 32, 8), tied=False), 8_190_735_360
    ),
    "Qwen1.5-MoE-A2.7B": Published(
        _qwen(
            "2Moe",
            (151936, 2048, 5632, 24, 16, 16),
            8192,
            windowed_from=21,
            tied=False,
            sliding_window=32768,
            **_QWEN2_MOE,
        ),
        14_315_784_192,
    ),
    "Qwen3-30B-A3B": Published(
        _qwen(
            "3Moe",
            (151936, 2048, 6144, 48, 32, 4),
            40960,
            windowed_from=48,
            tied=False,
            moe_intermediate_size=768,
            **_QWEN3_MOE,
        ),
        30_532_122_624,
    ),
    "gemma-2-2b": Published(_gemma2((256000, 2304, 9216, 26, 8, 4)), 2_614_341_888),
    "gemma-2-9b": Published(_gemma2((256000, 3584, 14336, 42, 16, 8)), 9_241_705_984),
    "gemma-2-27b": Published(
        _gemma2((256000, 4608, 36864, 46, 32, 16), 128, 144), 27_227_128_320
    ),
    "gemma-3-270m": Published(
        _gemma3((262144, 640, 2048, 18, 4, 1), **_GEMMA3_NEW), 268_098_176
    ),
    "gemma-3-1b": Published(
        _gemma3((262144, 1152, 6912, 26, 4, 1), sliding_window_pattern=6), 999_885_952
    ),
    "Phi-3-mini-4k": Published(
        _phi3((32064, 3072, 8192, 32, 32, 32), 4096, sliding_window=2047),
        3_821_079_552,
    ),
    "Phi-3-mini-128k": Published(
        _phi3((32064, 3072, 8192, 32, 32, 32), 131072, sliding_window=262144)
        | {"rope_scaling": _longrope(48)},
        3_821_079_552,
    ),
    "Phi-3.5-mini": Published(
        _phi3((32064, 3072, 8192, 32, 32, 32), 131072, sliding_window=262144)
        | {"rope_scaling": _longrope(48)},
        3_821_079_552,
    ),
    "Phi-4": Published(
        _phi3((100352, 5120, 17920, 40, 40, 10), 16384, 16384, sliding_window=None)
        | {"rope_theta": 250000},
        14_659_507_200,
    ),
    "Phi-4-mini": Published(
        _phi3((200064, 3072, 8192, 32, 24, 8), 131072, **_PHI4), 3_836_021_760
    ),
    "SmolLM3-3B": Published(
        _config(
            "SmolLM3",
            "smollm3",
            (128256, 2048, 11008, 36, 16, 4),
            65536,
            hidden_act="silu",
            rms_norm_eps=1e-6,
            **_SMOLLM3,
        ),
        3_075_098_624,
    ),
}
