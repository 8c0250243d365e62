from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.models import LIFTS, Net, inputs, net, three_ways
from tests.helpers.trees import (
    assert_leaves_close,
    filled,
    method_of,
    random_all,
    zeros,
)
from tsd_jax.binding.bound import SUFFIX, Guarded
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core import paths
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import Decoder

EVERYTHING = method_of("tsd+keep")


PLAIN = ("plain", "remat", "scan", "scan of remat")


@pytest.mark.parametrize("lift", LIFTS)
def test_factored_is_merged_in_outputs_and_gradients(lift):
    """All five kernels under the usual lifts; two, of several axes, under the rest."""
    pattern = ".*kernel" if lift in PLAIN else ".*/(each|join)/kernel"
    model, params, spec = net(lift, EVERYTHING, pattern=pattern)
    assert len(spec.kernels) == (5 if lift in PLAIN else 2)
    x = inputs(lift)
    trainable, directions = random_all(3, spec, scale=0.3)
    apply = adapted(model.apply)

    def factored(trainable):
        return apply({"params": bind(params, trainable, directions)}, x)

    def merged(trainable):
        return model.apply({"params": merge(params, trainable, directions)}, x)

    def differentiate(forward, trainable):
        def loss(trainable):
            y = forward(trainable)
            return jnp.sum(y**3), y

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    @jax.jit
    def both(trainable):
        return differentiate(factored, trainable), differentiate(merged, trainable)

    ((_, y), gradients), ((_, want_y), want) = both(trainable)
    np.testing.assert_allclose(y, want_y, rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    assert_leaves_close(gradients, want, atol=2e-5)


def test_at_step_0_the_function_is_the_pretrained_one():
    """Bit for bit; and so it is where nothing is bound."""
    lift = "scan of remat"
    model, params, spec = net(lift, EVERYTHING)
    x = inputs(lift)
    bound = bind(params, *jax.jit(lambda key: init(key, spec))(jax.random.key(0)))
    apply = jax.jit(adapted(model.apply))
    before = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_array_equal(apply({"params": bound}, x), before)
    np.testing.assert_array_equal(apply({"params": params}, x), before)


def test_bind_adds_leaves_beside_kernels_and_copies_nothing():
    _, params, spec = net("scan", EVERYTHING)
    flat = paths.flatten(params)
    bound = paths.flatten(bind(params, *random_all(0, spec)))
    assert set(bound) == set(flat) | {path + SUFFIX for path in spec.paths}
    held = {
        p: x.value if isinstance(x, Guarded) else x
        for p, x in bound.items()
        if p in flat
    }
    assert all(held[path] is leaf for path, leaf in flat.items())
    assert not any(path.endswith(SUFFIX) for path in paths.flatten(params))


def test_a_plain_apply_of_bound_parameters_is_refused():
    """Else it would train nothing, without a word."""
    model, params, spec = net("scan of remat", EVERYTHING)
    bound = bind(params, *random_all(0, spec))
    with pytest.raises(InputError, match=r"wrap its apply.*adapted\(model\.apply\)"):
        model.apply({"params": bound}, inputs("scan of remat"))


def test_bind_names_a_missing_kernel():
    _, params, spec = net("plain", EVERYTHING)
    pairs = random_all(0, spec)
    del params["head"]
    with pytest.raises(ValueError, match="no 'head/kernel'"):
        bind(params, *pairs)


def test_only_matched_kernels_get_adapters():
    model, params, _ = net("scan", EVERYTHING)
    rules = [Rule(pattern=r"body/(mix|join)/kernel", rank=2, directions=2)]
    spec = make_spec(model.apply, {"params": params}, rules, inputs("scan"))
    assert spec.paths == ("body/join/kernel", "body/mix/kernel")
    assert spec.method.name == "tsd"
    assert spec.trainable == 3 * (2 * (10 + 6) + 2) + 3 * (2 * (6 + 6) + 2)


def test_the_dense_change_is_never_formed():
    """No array of a gradient program has a kernel's size, but the kernel itself."""
    model = nn.Dense(300)
    params = {"kernel": jnp.zeros((200, 300)), "bias": jnp.zeros(300)}
    x = jnp.ones((4, 200))
    rules = [Rule(pattern="kernel", rank=2, directions=2)]
    spec = make_spec(model.apply, {"params": params}, rules, x, method="tsd")
    trainable, directions = random_all(0, spec)

    def loss(trainable):
        bound = bind(params, trainable, directions)
        return jnp.sum(adapted(model.apply)({"params": bound}, x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
    sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars]  # pyright: ignore[reportAttributeAccessIssue]
    assert max(sizes) < 200 * 300


def test_bfloat16_models_stay_bfloat16():
    """An fp32 result would break the scan's carry; the path itself is fp32."""
    lift = "scan of remat"
    model, params, spec = net(lift, EVERYTHING, dtype=jnp.bfloat16)
    x = inputs(lift, jnp.bfloat16)
    pairs = random_all(3, spec, scale=0.3)
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype("float32")}
    y = jax.jit(adapted(model.apply))({"params": bind(params, *pairs)}, x)
    assert y.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact, _, _ = three_ways(Net(lift), wide, pairs, x.astype(jnp.float32))
    error = np.abs(np.asarray(y, np.float32) - np.asarray(exact)).max()
    assert error < 0.02 * np.abs(np.asarray(exact)).max()


def test_the_sum_is_rounded_once():
    """The low-rank path meets y in float32; rounding it before would show."""
    model = nn.Dense(8, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (16, 8), jnp.bfloat16)
    params = model.init(jax.random.key(1), x)["params"]
    rules = [Rule(pattern="kernel", rank=4, directions=4)]
    spec = make_spec(model.apply, {"params": params}, rules, x, method=EVERYTHING)
    trainable, directions = random_all(0, spec)
    y = adapted(model.apply)({"params": bind(params, trainable, directions)}, x)
    down_up = merge({"kernel": jnp.zeros((8, 8))}, trainable, directions)["kernel"]
    base = np.asarray(model.apply({"params": params}, x), np.float64)
    exact = base + np.asarray(x, np.float64) @ np.asarray(down_up, np.float64)
    np.testing.assert_array_equal(y, jnp.asarray(exact).astype(jnp.bfloat16))


@functools.cache
def llama():
    config = DecoderConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    model = Decoder(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 17)
    shapes = jax.eval_shape(
        functools.partial(model.init, decode=True), jax.random.key(0), tokens
    )
    variables = {
        "params": filled(0, shapes["params"], 0.4),
        "cache": zeros(shapes["cache"]),
    }
    rules = [Rule(pattern=r".*_proj/kernel|lm_head/kernel", rank=2, directions=2)]
    params = variables["params"]
    spec = make_spec(model.apply, {"params": params}, rules, tokens, method=EVERYTHING)
    return model, variables, tokens, spec


def test_a_decoder_with_a_cache_gives_the_logits_of_the_merged_model():
    model, variables, tokens, spec = llama()
    assert len(spec.kernels) == 8
    params, cache = variables["params"], variables["cache"]
    pairs = random_all(0, spec, scale=0.3)
    want = jax.jit(model.apply)({"params": merge(params, *pairs)}, tokens)
    bound = bind(params, *pairs)
    apply = adapted(model.apply)

    @jax.jit
    def decode(cache, tokens):
        variables = {"params": bound, "cache": cache}
        return apply(variables, tokens, decode=True, mutable=["cache"])

    logits = []
    for n in range(tokens.shape[1]):
        step, changed = decode(cache, tokens[:, n : n + 1])
        cache = changed["cache"]
        logits.append(step)
    got = jnp.concatenate(logits, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_spec_can_be_made_from_a_decoding_call():
    model, variables, tokens, spec = llama()
    rules = [Rule(pattern=r".*_proj/kernel|lm_head/kernel", rank=2, directions=2)]
    same = make_spec(
        model.apply,
        variables,
        rules,
        tokens[:, :1],
        method=EVERYTHING,
        decode=True,
        mutable=["cache"],
    )
    assert same == spec


def test_full_parameters_take_the_place_of_the_base_s():
    """In outputs and gradients as merged; rows too, stacked leaves and tied tables."""
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
    )
    model, tokens = Decoder(config), jnp.arange(11)[None]
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = filled(0, shapes, 0.4)
    rules = [
        Rule(pattern=r".*/q_proj/kernel", rank=2),
        Full(pattern=r".*/(scale|up_proj/kernel)"),
        Full(pattern="embed_tokens/embedding", rows=(8, 11)),
    ]
    spec = make_spec(model.apply, {"params": shapes}, rules, tokens, method="lora")
    assert spec.paths == ("layers/self_attn/q_proj/kernel",)
    assert [part.path for part in spec.full] == [
        "embed_tokens/embedding",
        "layers/input_layernorm/scale",
        "layers/mlp/up_proj/kernel",
        "layers/post_attention_layernorm/scale",
        "norm/scale",
    ]
    trainable, directions = init(jax.random.key(0), spec, params=params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)

    def loss(trainable, forward):
        return jnp.sum(forward(trainable) ** 2)

    def factored(trainable):
        bound = bind(params, trainable, directions)
        return adapted(model.apply)({"params": bound}, tokens)

    def merged(trainable):
        return model.apply({"params": merge(params, trainable, directions)}, tokens)

    @jax.jit
    def both(trainable):
        each = (factored, merged)
        return [jax.value_and_grad(loss)(trainable, forward) for forward in each]

    (ours, gradients), (theirs, want) = both(trainable)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for got, wanted in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True
    ):
        assert np.abs(wanted).max() > 1e-4
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    assert gradients.full["embed_tokens/embedding"].value.shape == (3, 8)
