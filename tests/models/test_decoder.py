"""The decoder against a straight NumPy/float64 one, and against itself."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from tests.helpers.applied import decode, forward
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import DECODER_RULES, Decoder, head_name, make_head

CONFIG = DecoderConfig(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rms_norm_eps=0.05,
    rope_theta=50.0,
)
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
}
TOKENS = np.random.default_rng(0).integers(37, size=(3, 7))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
MASK = MASK.astype(bool)


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def random_params(model):
    """Parameters of a trained size, biases and scales included."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype), shapes
    )


def unstacked(params):
    """The same parameters, as the model without a scan has them."""
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    layers = len(params["layers"]["input_layernorm"]["scale"])
    taken = {
        f"layers_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
        for n in range(layers)
    }
    return rest | taken


def oracle(params, config, tokens, positions):
    """Logits (T, V) of one row of T real tokens, one head at a time, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    half = config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    frequencies = config.rope_theta ** -(np.arange(half) / half)
    turn = np.exp(1j * np.outer(positions, frequencies))

    def dense(x, of):
        return x @ of["kernel"] + of.get("bias", 0)

    def norm(x, of):
        power = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(power + config.rms_norm_eps) * of["scale"]

    def rotated(x):
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(x, of):
        mixed = []
        query, key, value = (dense(x, of[f"{name}_proj"]) for name in "qkv")
        for head in range(config.num_attention_heads):
            own = slice(head * config.head_dim, (head + 1) * config.head_dim)
            start = head // group * config.head_dim
            shared = slice(start, start + config.head_dim)
            scores = rotated(query[:, own]) @ rotated(key[:, shared]).T
            scores = np.tril(np.exp(scores / np.sqrt(config.head_dim)))
            weights = scores / scores.sum(-1, keepdims=True)
            mixed.append(weights @ value[:, shared])
        return dense(np.concatenate(mixed, axis=-1), of["o_proj"])

    def mlp(x, of):
        gate = dense(x, of["gate_proj"])
        up = dense(x, of["up_proj"])
        return dense(gate / (1 + np.exp(-gate)) * up, of["down_proj"])

    x = params["embed_tokens"]["embedding"][tokens]
    for layer in range(config.num_hidden_layers):
        of = params[f"layers_{layer}"]
        x = x + attention(norm(x, of["input_layernorm"]), of["self_attn"])
        x = x + mlp(norm(x, of["post_attention_layernorm"]), of["mlp"])
    x = norm(x, params["norm"])
    if config.tie_word_embeddings:
        return x @ params["embed_tokens"]["embedding"].T
    return x @ params["lm_head"]["kernel"]


@pytest.fixture(scope="module")
def params():
    return random_params(Decoder(CONFIG))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_a_float64_model(variant):
    config = dataclasses.replace(CONFIG, **variant)
    model = Decoder(config)
    params = random_params(model)
    logits = forward(model, params, TOKENS, mask=MASK)
    for row in range(len(TOKENS)):
        real = MASK[row]
        expected = oracle(
            unstacked(params),
            config,
            TOKENS[row, real],
            np.arange(real.sum()),
        )
        np.testing.assert_allclose(logits[row, real], expected, atol=2e-5, rtol=1e-5)


def test_positions_can_be_given(params):
    positions = np.stack([np.arange(7) * 3, np.arange(7) + 90, np.arange(7)[::-1]])
    logits = forward(Decoder(CONFIG), params, TOKENS, positions)
    for row in range(len(TOKENS)):
        expected = oracle(unstacked(params), CONFIG, TOKENS[row], positions[row])
        np.testing.assert_allclose(logits[row], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_the_head_goes_on_where_the_model_stops(variant):
    change = {**VARIANTS[variant], "final_logit_softcapping": 2.0}
    model = Decoder(dataclasses.replace(CONFIG, **change))
    variables = {"params": random_params(model)}
    apply: Any = model.apply
    hidden = apply(variables, TOKENS, head=False)
    assert hidden.shape == (*TOKENS.shape, CONFIG.hidden_size)
    name = head_name(model.config)
    rest = {"params": {name: variables["params"][name]}}
    found = make_head(model)(rest, hidden[:, 2:5])
    expected = forward(model, variables["params"], TOKENS)
    np.testing.assert_allclose(found, expected[:, 2:5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_show(params, side):
    model = Decoder(CONFIG)
    alone = forward(model, params, TOKENS)
    width = ((0, 0), (4, 0) if side == "left" else (0, 4))
    padded = np.pad(TOKENS, width, constant_values=5)
    mask = np.pad(np.ones(TOKENS.shape, bool), width)
    logits = forward(model, params, padded, mask=mask)
    found = logits[:, 4:] if side == "left" else logits[:, :-4]
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=1e-5)


def test_rows_of_padding_stay_finite(params):
    model = Decoder(CONFIG)
    mask = MASK.copy()
    mask[0] = False

    def total(params):
        return jnp.sum(jnp.square(forward(model, params, TOKENS, mask=mask)))

    value, gradients = jax.jit(jax.value_and_grad(total))(params)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_token_of_padding_sees_itself_where_nothing_stands_before_it(params):
    model = Decoder(CONFIG)
    logits = forward(model, params, TOKENS, mask=MASK)
    alone = forward(model, params, TOKENS[2, :6, None])
    np.testing.assert_allclose(logits[2, :6], alone[:, 0], atol=1e-5, rtol=1e-5)


def test_scan_is_the_loop(params):
    stacked = forward(Decoder(CONFIG), params, TOKENS, mask=MASK)
    loop = Decoder(CONFIG, scan_layers=False)
    looped = forward(loop, unstacked(params), TOKENS, mask=MASK)
    np.testing.assert_allclose(looped, stacked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_changes_no_value_and_no_gradient(params, scan_layers):
    weights = params if scan_layers else unstacked(params)

    def total(params, remat):
        model = Decoder(CONFIG, scan_layers=scan_layers, remat=remat)
        return jnp.sum(jnp.sin(forward(model, params, TOKENS, mask=MASK)))

    results = []
    for remat in (False, True):
        run = jax.jit(jax.value_and_grad(functools.partial(total, remat=remat)))
        traced = run.trace(weights)
        assert ("remat" in str(traced.jaxpr)) == remat
        results.append(traced.lower().compile()(weights))
    plain, recomputed = results
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        recomputed,
        plain,
    )


@pytest.mark.parametrize("chunks", [(7,), (6, 1), (3, 1, 1, 2)])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_decoding_is_the_full_forward(params, chunks, scan_layers):
    model = Decoder(CONFIG, scan_layers=scan_layers)
    weights = params if scan_layers else unstacked(params)
    full = forward(model, weights, TOKENS, mask=MASK)
    _, state = decode(model, weights, {}, np.zeros((3, 9), int))
    found, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        logits, state = decode(
            model, weights, state, TOKENS[:, part], mask=MASK[:, part]
        )
        found.append(logits)
        start += size
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found[MASK], full[MASK], atol=1e-5, rtol=1e-5)
    assert jnp.isfinite(found).all()


def test_the_first_call_makes_an_empty_cache(params):
    model = Decoder(CONFIG, dtype=jnp.bfloat16)
    _, state = decode(model, params, {}, TOKENS)
    cache = flat(state["cache"])
    assert {path: (leaf.shape, str(leaf.dtype)) for path, leaf in cache.items()} == {
        "layers/self_attn/key": ((2, 3, 7, 2, 6), "bfloat16"),
        "layers/self_attn/value": ((2, 3, 7, 2, 6), "bfloat16"),
        "mask": ((3, 7), "bool"),
        "index": ((), "int32"),
    }
    assert not any(leaf.any() for leaf in cache.values())


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(params):
    exact = forward(Decoder(CONFIG), params, TOKENS, mask=MASK)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    model = Decoder(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    logits = forward(model, half, TOKENS, mask=MASK)
    assert logits.dtype == jnp.float32
    error = np.abs(logits - exact)[MASK]
    assert 1e-3 < error.max() < 0.05 * np.abs(exact).max()
    # Not rounded to bfloat16 on the way out.
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    made = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("bfloat16")}


SHAPES = {
    "embed_tokens/embedding": (37, 16),
    "layers/input_layernorm/scale": (2, 16),
    "layers/self_attn/q_proj/kernel": (2, 16, 24),
    "layers/self_attn/k_proj/kernel": (2, 16, 12),
    "layers/self_attn/v_proj/kernel": (2, 16, 12),
    "layers/self_attn/o_proj/kernel": (2, 24, 16),
    "layers/post_attention_layernorm/scale": (2, 16),
    "layers/mlp/gate_proj/kernel": (2, 16, 24),
    "layers/mlp/up_proj/kernel": (2, 16, 24),
    "layers/mlp/down_proj/kernel": (2, 24, 16),
    "norm/scale": (16,),
    "lm_head/kernel": (16, 37),
}
ATTENTION_BIASES = {
    "layers/self_attn/q_proj/bias": (2, 24),
    "layers/self_attn/k_proj/bias": (2, 12),
    "layers/self_attn/v_proj/bias": (2, 12),
    "layers/self_attn/o_proj/bias": (2, 16),
}
MLP_BIASES = {
    "layers/mlp/gate_proj/bias": (2, 24),
    "layers/mlp/up_proj/bias": (2, 24),
    "layers/mlp/down_proj/bias": (2, 16),
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, SHAPES),
        ({"attention_bias": True}, SHAPES | ATTENTION_BIASES),
        ({"mlp_bias": True}, SHAPES | MLP_BIASES),
    ],
)
def test_the_tree_is_the_documented_one(change, expected):
    model = Decoder(dataclasses.replace(CONFIG, **change))
    tree = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert {path: leaf.shape for path, leaf in flat(tree).items()} == expected


@pytest.mark.parametrize("scan_layers", [True, False])
def test_rules_cut_every_kernel_and_nothing_else(scan_layers):
    model = Decoder(CONFIG, scan_layers=scan_layers)
    tree = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    found = {
        path: next(
            spec for pattern, spec in DECODER_RULES if re.fullmatch(pattern, path)
        )
        for path in flat(tree)
    }
    inward, outward = P("fsdp", "tensor"), P("tensor", "fsdp")
    expected = {"lm_head": inward, "embed_tokens": outward}
    expected |= {f"{name}_proj": inward for name in ("q", "k", "v", "gate", "up")}
    expected |= {f"{name}_proj": outward for name in ("o", "down")}
    for path, spec in found.items():
        wanted = expected.get(path.split("/")[-2], P())
        stacked = path.startswith("layers/") and wanted != P()
        assert spec == (P(None, *wanted) if stacked else wanted), path
    assert sum(spec != P() for spec in found.values()) == (9 if scan_layers else 16)
