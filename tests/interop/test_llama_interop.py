"""Our Llama is the one of transformers: same files, same logits, same text."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tsd_jax import huggingface
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")

TOLERANCE = 2e-4
SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
    "pad_token_id": 0,
}
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 16},
    "far_rotation": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}
    },
    "large_epsilon": {"rms_norm_eps": 0.3},
}
MASK = np.ones((3, 11), int)
MASK[0, :4] = 0
MASK[1, :10] = 0


def random_torch_model(**change):
    """A stock model; biases and scales too are random."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | change))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(0.5, 0.5)
    return model.eval()


def torch_logits(model, tokens, mask=None, positions=None):
    arguments = {"attention_mask": mask, "position_ids": positions}
    given = {k: torch.from_numpy(v) for k, v in arguments.items() if v is not None}
    with torch.no_grad():
        return model(torch.from_numpy(tokens), **given).logits.float().numpy()


def our_logits(folder, tokens, mask=None, positions=None, scan_layers=True):
    config = huggingface.read_config(folder)
    params = huggingface.load_params(folder, config, scan_layers=scan_layers)
    apply = jax.jit(Decoder(config, scan_layers=scan_layers).apply)
    mask = None if mask is None else mask.astype(bool)
    return np.asarray(apply({"params": params}, tokens, positions, mask))


def positions_of(mask):
    """What transformers counts in `generate`; its plain forward counts padding."""
    return np.maximum(np.cumsum(mask, axis=-1) - 1, 0)


def random_tokens(vocabulary, shape=MASK.shape):
    return np.random.default_rng(0).integers(1, vocabulary, size=shape)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_random_models(tmp_path, variant):
    model = random_torch_model(**variant)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(67)
    expected = torch_logits(model, tokens)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(our_logits(tmp_path, tokens), expected, atol=TOLERANCE)
    expected = torch_logits(model, tokens, MASK, positions_of(MASK))
    found = our_logits(tmp_path, tokens, MASK)
    real = MASK.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=TOLERANCE)


def test_logits_at_other_positions(tmp_path):
    model = random_torch_model()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(67)
    positions = np.arange(11)[None] * 2 + np.array([[0], [17], [40]])
    expected = torch_logits(model, tokens, positions=positions)
    found = our_logits(tmp_path, tokens, positions=positions)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    plain = torch_logits(model, tokens)
    assert np.abs(expected - plain).max() > 100 * TOLERANCE


def test_logits_of_shards_and_of_layers_apart(tmp_path):
    model = random_torch_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = random_tokens(67)
    found = our_logits(tmp_path, tokens, scan_layers=False)
    np.testing.assert_allclose(found, torch_logits(model, tokens), atol=TOLERANCE)


def test_bfloat16_weights_are_read_exactly(tmp_path):
    model = random_torch_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    params = huggingface.load_params(tmp_path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for name, tensor in huggingface.to_huggingface(params, config).items():
        expected = model.state_dict()[name].float().numpy()
        np.testing.assert_array_equal(tensor.astype(np.float32), expected)


@pytest.mark.parametrize("variant", ["untied", "tied", "attention_bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_we_write(tmp_path, variant, dtype):
    first, second = tmp_path / "first", tmp_path / "second"
    model = random_torch_model(**VARIANTS[variant])
    model.save_pretrained(first)
    config = huggingface.read_config(first)
    params = huggingface.load_params(first, config)
    extra = {"eos_token_id": 5}
    huggingface.write_checkpoint(second, config, params, dtype=dtype, extra=extra)
    again, info = transformers.LlamaForCausalLM.from_pretrained(
        second, output_loading_info=True
    )
    assert not any(info.values()), info
    assert again.dtype == getattr(torch, dtype)
    assert again.config.eos_token_id == 5
    for name, tensor in model.to(again.dtype).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    names = ("rms_norm_eps", "rope_parameters", "head_dim", "num_key_value_heads")
    for name in names:
        assert getattr(again.config, name) == getattr(model.config, name), name


@functools.cache
def real_model(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_logits_of_real_models(shared, name):
    folder = shared / "models" / name
    model = real_model(folder)
    tokens = random_tokens(model.config.vocab_size, (3, 200))
    mask = np.ones(tokens.shape, int)
    mask[0, :37] = mask[1, :199] = 0
    expected = torch_logits(model, tokens, mask, positions_of(mask))
    found = our_logits(folder, tokens, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=TOLERANCE)
