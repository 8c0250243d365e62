"""Every family is the one of transformers: same files, same logits."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import transformers

from tests.helpers.compiled import QUICK
from tests.helpers.decoders import PUBLISHED, inputs, write_decoder
from tests.helpers.trees import random_all
from tsd_jax import huggingface
from tsd_jax.binding.linen import make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.spec import Rule
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.models.decoder import Decoder

pytest.importorskip("torch")
from tests.helpers.stock import stock_model, torch_logits

TOLERANCE = 2e-4
# Less time to compile; the ordinary programs are held against goldens.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
TOKENS, MASK, POSITIONS = inputs()
LLAMA3 = PUBLISHED["llama"]["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 7.0, 9.0],
}
# {id: (family, changes of its published config)}; None takes an entry away.
CASES = {
    **{family: (family, {}) for family in PUBLISHED},
    "llama plain": ("llama", {"rope_scaling": None, "num_key_value_heads": 1}),
    "llama linear": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "head_dim": 6},
    ),
    "llama dynamic": (
        "llama",
        {
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
    ),
    "llama yarn": ("llama", {"rope_scaling": YARN, "num_key_value_heads": 4}),
    "llama yarn with all": (
        "llama",
        {
            "rope_scaling": YARN
            | {"beta_fast": 4, "beta_slow": 0.5, "mscale": 0.7, "truncate": False}
            | {"mscale_all_dim": 0.4},
            "rope_theta": 100.0,
            "attention_bias": True,
        },
    ),
    "llama 3.2": ("llama", {"rope_scaling": LLAMA3 | {"factor": 32.0}, "head_dim": 16}),
    "llama gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", "mlp_bias": True}),
    "mistral without window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral of a wide window": ("mistral", {"sliding_window": 24}),
    "mixtral with window": ("mixtral", {"sliding_window": 5, "num_experts_per_tok": 1}),
    "qwen2 without window": (
        "qwen2",
        {"use_sliding_window": False, "tie_word_embeddings": True},
    ),
    "qwen2 yarn": (
        "qwen2",
        {
            "use_sliding_window": False,
            "rope_scaling": YARN | {"original_max_position_embeddings": 24},
            "rope_theta": 4.0,
        },
    ),
    "qwen3 with window": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_moe with window": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 3,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe with window": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 4, "norm_topk_prob": False},
    ),
    "gemma2 without caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2 of types": (
        "gemma2",
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
    ),
    "gemma3_text linear": (
        "gemma3_text",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3_text of one type": (
        "gemma3_text",
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": 30},
    ),
    "phi3 short": (
        "phi3",
        {
            "rope_scaling": {**LONG, "type": "su"},
            "original_max_position_embeddings": 60,
            "max_position_embeddings": 240,
        },
    ),
    "phi3 long": (
        "phi3",
        {
            "rope_scaling": LONG,
            "original_max_position_embeddings": 16,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "phi3 partial": (
        "phi3",
        {"partial_rotary_factor": 0.75, "num_key_value_heads": 4},
    ),
    "smollm3 without rope": ("smollm3", {"no_rope_layers": [0] * 4}),
    "smollm3 with window": (
        "smollm3",
        {
            "no_rope_layers": None,
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layer_interval": 2,
        },
    ),
}


def published(case):
    """Return a family and the config.json of a case."""
    family, changes = CASES[case]
    merged = {**PUBLISHED[family], **changes}
    nulls = {"no_rope_layers", "rope_scaling"}
    return family, {
        name: value
        for name, value in merged.items()
        if value is not None or name not in nulls
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    family, content = published(case)
    model, saved = stock_model(content, tmp_path)
    config = huggingface.read_config(saved)
    assert config.model_type == family
    params = huggingface.load_params(saved, config)
    apply = jax.jit(Decoder(config).apply, compiler_options=QUICK)

    plain = torch_logits(model, TOKENS)
    masked = torch_logits(model, TOKENS, MASK.astype(int), POSITIONS)
    assert np.abs(plain).max() > 1
    assert np.abs(masked - plain)[MASK].max() > 100 * TOLERANCE
    found = np.asarray(apply({"params": params}, TOKENS, POSITIONS, MASK))
    np.testing.assert_allclose(found[MASK], masked[MASK], atol=TOLERANCE, rtol=0)
    if case == family:  # without a mask, other code runs
        found = np.asarray(apply({"params": params}, TOKENS))
        np.testing.assert_allclose(found, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", PUBLISHED)
def test_transformers_reads_what_we_write(tmp_path, family):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_decoder(first, PUBLISHED[family])
    config = huggingface.read_config(first)
    params = huggingface.load_params(first, config)
    ids = {name: PUBLISHED[family][name] for name in TOKEN_IDS}
    huggingface.write_checkpoint(second, config, params, extra=ids)
    assert huggingface.read_config(second) == config
    logits = []
    for folder in (first, second):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info.values()), info
        logits.append(torch_logits(model.eval(), TOKENS, MASK.astype(int), POSITIONS))
    np.testing.assert_array_equal(*logits)


# Experts are exported layer by layer; PEFT itself warns of what it does to them.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "scan_layers", "pattern", "modules"),
    [
        ("phi3", True, r"layers/.*_proj/kernel", 4 * 4),
        ("gemma3_text", True, r"layers/.*_proj/kernel", 4 * 7),
        ("qwen2_moe", True, r"layers/self_attn/.*_proj/kernel", 4 * 4),
        ("mixtral", False, r"layers_\d/.*_proj/kernel", 4 * 4 + 4 * 2),
        ("qwen3_moe", False, r"layers_\d/mlp/experts/.*/kernel", 4 * 2),
    ],
)
def test_peft_gives_our_logits(tmp_path, family, scan_layers, pattern, modules):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    write_decoder(base, PUBLISHED[family])
    config = huggingface.read_config(base)
    params = huggingface.load_params(base, config, scan_layers=scan_layers)
    model = Decoder(config, scan_layers=scan_layers)
    rules = [Rule(pattern=pattern, rank=2, directions=2)]
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method="tsd")
    pairs = random_all(0, spec, scale=0.2)
    to_peft(
        adapter,
        *pairs,
        functools.partial(huggingface.module_name, model_type=config.model_type),
        base_model=str(base),
        params=params,
    )
    stock = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    plain = torch_logits(stock, TOKENS)
    loaded = peft.PeftModel.from_pretrained(stock, adapter).eval()
    adapted_modules = [
        name for name, _ in loaded.named_modules() if name.endswith("lora_A.default")
    ]
    assert len(adapted_modules) == modules
    expected = torch_logits(loaded, TOKENS)
    merged = merge(params, *pairs)
    apply = jax.jit(model.apply, compiler_options=QUICK)
    found = np.asarray(apply({"params": merged}, TOKENS))
    assert np.abs(expected - plain).max() > 0.3
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
