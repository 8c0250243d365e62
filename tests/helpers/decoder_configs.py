"""Small config.jsons of every family, drawn by hypothesis.

They vary what published files vary: sizes that do not fit each other neatly, entries
that are silent, null or at their defaults, and the places where the two versions of
transformers write rotary settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import strategies as st

from tests.helpers.decoders import PUBLISHED

Draw = Callable[..., Any]
Values = dict[str, Any]
WINDOWED, WIDE = "sliding_attention", "full_attention"


def _number(low: float, high: float) -> st.SearchStrategy[float]:
    """Return short decimals: they are what files hold, and shrink well."""
    return st.integers(round(low * 10), round(high * 10)).map(lambda n: n / 10)


_THETAS = st.sampled_from([30.0, 500.0, 10000, 1e6])
_WINDOWS = st.integers(1, 26)
_OPTIONAL_LENGTH = st.none() | st.integers(8, 60)


def _linear(draw: Draw, pairs: int) -> Values:
    del pairs
    return {"factor": draw(_number(1, 9))}


def _llama3(draw: Draw, pairs: int) -> Values:
    del pairs
    low = draw(_number(0.5, 2))
    return {
        "factor": draw(_number(1, 32)),
        "low_freq_factor": low,
        "high_freq_factor": low + draw(_number(0.5, 4)),
        "original_max_position_embeddings": draw(st.integers(8, 60)),
    }


def _yarn(draw: Draw, pairs: int) -> Values:
    del pairs
    return {
        "factor": draw(_number(1, 16)),
        "original_max_position_embeddings": draw(_OPTIONAL_LENGTH),
        "attention_factor": draw(st.none() | _number(0.5, 2)),
        "beta_fast": draw(st.none() | st.integers(2, 40)),
        "beta_slow": draw(st.none() | _number(0.1, 1.5)),
        "mscale": draw(st.none() | _number(0.5, 1.5)),
        "mscale_all_dim": draw(st.none() | _number(0.5, 1.5)),
        **draw(st.sampled_from([{}, {"truncate": False}, {"truncate": True}])),
    }


def _longrope(draw: Draw, pairs: int) -> Values:
    factors = st.lists(_number(1, 30), min_size=pairs, max_size=pairs)
    return {
        "short_factor": draw(factors),
        "long_factor": draw(factors),
        "original_max_position_embeddings": draw(st.integers(8, 60)),
        "factor": draw(st.none() | _number(1, 8)),
        "attention_factor": draw(st.none() | _number(0.5, 2)),
    }


ROPES: Mapping[str, Callable[[Draw, int], Values]] = {
    "linear": _linear,
    "dynamic": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _settings(draw: Draw, pairs: int, kinds: tuple[str, ...]) -> Values:
    """Draw rotary settings of one of `kinds`, or "default"."""
    kind = draw(st.sampled_from(["default", *kinds]))
    values = {} if kind == "default" else ROPES[kind](draw, pairs)
    given = {name: value for name, value in values.items() if value is not None}
    return {draw(st.sampled_from(["rope_type", "type"])): kind, **given}


def _rope(draw: Draw, pairs: int, kinds: tuple[str, ...] = tuple(ROPES)) -> Values:
    """Draw settings where transformers 4 or 5 keeps them."""
    theta, settings = draw(_THETAS), _settings(draw, pairs, kinds)
    if draw(st.booleans()):
        return {"rope_parameters": {"rope_theta": theta, **settings}}
    plain = "default" in settings.values()
    return {"rope_theta": theta, "rope_scaling": None if plain else settings}


def _sizes(draw: Draw, *, own_width: bool = True) -> Values:
    """Draw what every family has; `head_dim` where it may differ from D / N."""
    keys, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, width = keys * groups, 2 * draw(st.integers(2, 6))
    free = own_width and draw(st.booleans())
    per_head = draw(st.integers(3, 9)) if free else width
    return {
        "vocab_size": draw(st.integers(67, 101)),
        "hidden_size": heads * per_head,
        "intermediate_size": draw(st.integers(9, 50)),
        "num_hidden_layers": draw(st.sampled_from([2, 3, 4, 1])),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "max_position_embeddings": draw(st.integers(10, 70)),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        **({"head_dim": width} if free or draw(st.booleans()) else {}),
    }


def _pairs(values: Values) -> int:
    """Count the pairs that a head turns."""
    of = values["hidden_size"] // values["num_attention_heads"]
    return values.get("head_dim", of) // 2


def _switch(draw: Draw, *names: str) -> Values:
    """Draw booleans; some are left to their defaults."""
    choices = st.sampled_from([None, False, True])
    drawn = {name: draw(choices) for name in names}
    return {name: value for name, value in drawn.items() if value is not None}


def _act(draw: Draw) -> Values:
    return {"hidden_act": draw(st.sampled_from(["silu", "gelu_pytorch_tanh"]))}


def _types(draw: Draw, values: Values) -> Values:
    number = values["num_hidden_layers"]
    kinds = st.lists(
        st.sampled_from([WINDOWED, WIDE]), min_size=number, max_size=number
    )
    return {"layer_types": draw(kinds)} if draw(st.booleans()) else {}


def _chosen_windows(draw: Draw, values: Values, *, first: bool = True) -> Values:
    """Draw windows that `use_sliding_window` turns on."""
    if draw(st.sampled_from([False, False, True])):
        return {"use_sliding_window": False, "sliding_window": draw(_WINDOWS)}
    drawn = {"use_sliding_window": True, "sliding_window": draw(_WINDOWS)}
    if first:
        drawn["max_window_layers"] = draw(st.sampled_from([1, 0, 2, 3, 4]))
    return {**drawn, **_types(draw, values)}


def _llama(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw)
    biases = _switch(draw, "attention_bias", "mlp_bias")
    return values | biases | _rope(draw, _pairs(values))


def _mistral(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw) | {"sliding_window": draw(st.none() | _WINDOWS)}
    return values | _rope(draw, _pairs(values))


def _ministral(draw: Draw) -> Values:
    values = _mistral(draw)
    values.setdefault("head_dim", 2 * _pairs(values))  # else transformers may fail
    values["sliding_window"] = draw(_WINDOWS)  # which transformers needs here
    # Older files call themselves a Mistral.
    old = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    types = _types(draw, values)
    return values | types | (draw(st.sampled_from([{}, old])) if types else {})


def _mixtral(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw)
    values.setdefault("head_dim", 2 * _pairs(values))  # else transformers may fail
    experts = draw(st.integers(1, 5))
    return (
        values
        | {"num_local_experts": experts, "sliding_window": draw(st.none() | _WINDOWS)}
        | {"num_experts_per_tok": draw(st.integers(1, experts))}
        | _rope(draw, _pairs(values))
    )


def _qwen2(draw: Draw) -> Values:
    values = _sizes(draw, own_width=False) | _act(draw)
    values.pop("head_dim", None)
    return values | _chosen_windows(draw, values) | _rope(draw, _pairs(values))


def _qwen3(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw)
    values.setdefault("head_dim", 2 * _pairs(values))
    switches = _switch(draw, "attention_bias")
    windows = _chosen_windows(draw, values)
    return values | switches | windows | _rope(draw, _pairs(values))


def _qwen_experts(draw: Draw) -> Values:
    experts = draw(st.integers(1, 5))
    return {
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(st.integers(5, 30)),
        **_switch(draw, "norm_topk_prob"),
        **draw(st.sampled_from([{}, {"decoder_sparse_step": 1}])),
        **draw(st.sampled_from([{}, {"mlp_only_layers": []}])),
    }


def _qwen2_moe(draw: Draw) -> Values:
    values = _qwen2(draw) | _switch(draw, "qkv_bias") | _qwen_experts(draw)
    return values | {"shared_expert_intermediate_size": draw(st.integers(5, 30))}


def _qwen3_moe(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw) | _switch(draw, "attention_bias")
    windows = _chosen_windows(draw, values, first=False)
    windows.pop("layer_types", None)
    rope = _rope(draw, _pairs(values))
    return values | windows | _qwen_experts(draw) | rope


def _gemma(draw: Draw) -> Values:
    values = _sizes(draw)
    values.setdefault("head_dim", 2 * _pairs(values))
    limits = st.none() | _number(0.5, 5)
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return {
        **values,
        **{name: draw(limits) for name in names},
        **_switch(draw, "attention_bias"),
        **_types(draw, values),
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "silu"])),
        "query_pre_attn_scalar": draw(st.integers(3, 40)),
        "sliding_window": draw(_WINDOWS),
    }


def _gemma2(draw: Draw) -> Values:
    values = _gemma(draw)
    return values | _rope(draw, _pairs(values))


def _gemma3(draw: Draw) -> Values:
    values, theta, local = _gemma(draw), draw(_THETAS), draw(_THETAS)
    settings = _settings(draw, _pairs(values), ("linear", "llama3", "yarn", "longrope"))
    # For this family alone, transformers overlooks both.
    settings.pop("truncate", None)
    settings = {"rope_type" if n == "type" else n: v for n, v in settings.items()}
    pattern = draw(st.sampled_from([{}, {"sliding_window_pattern": 2}]))
    if draw(st.booleans()):
        near = {"rope_type": "default", "rope_theta": local}
        nested = {WIDE: {"rope_theta": theta, **settings}, WINDOWED: near}
        return values | pattern | {"rope_parameters": nested}
    plain = "default" in settings.values()
    old = {"rope_theta": theta, "rope_local_base_freq": local}
    old["rope_scaling"] = None if plain else settings
    return values | pattern | old


def _phi3(draw: Draw) -> Values:
    values = _sizes(draw, own_width=False)
    values.pop("head_dim", None)
    width = 2 * _pairs(values)
    parts = [p for p in (1.0, 0.75, 0.5) if not int(p * width) % 2]
    part, length = draw(st.sampled_from(parts)), draw(st.integers(8, 60))
    rope = _rope(draw, int(part * width) // 2, ("longrope",))
    where = draw(st.sampled_from([rope, rope.get("rope_parameters", rope)]))
    where["partial_rotary_factor"] = part
    return {
        **values,
        **rope,
        "original_max_position_embeddings": length,
        "sliding_window": draw(st.none() | _WINDOWS),
    }


def _smollm3(draw: Draw) -> Values:
    values = _sizes(draw) | _act(draw) | _switch(draw, "attention_bias", "mlp_bias")
    number = values["num_hidden_layers"]
    turned = st.lists(st.integers(0, 1), min_size=number, max_size=number)
    listed = {"no_rope_layers": draw(turned)} if draw(st.booleans()) else {}
    every = draw(st.sampled_from([{}, {"no_rope_layer_interval": 2}]))
    windows = _chosen_windows(draw, values, first=False)
    return values | listed | every | windows | _rope(draw, _pairs(values))


_FAMILIES: Mapping[str, Callable[[Draw], Values]] = {
    "llama": _llama,
    "mistral": _mistral,
    "ministral": _ministral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
}


@st.composite
def configs(draw: Draw, family: str) -> Values:
    """Draw the content of a config.json."""
    names = ("architectures", "model_type", "pad_token_id")
    names += ("bos_token_id", "eos_token_id")
    same = {name: PUBLISHED[family][name] for name in names}
    return same | _FAMILIES[family](draw)
