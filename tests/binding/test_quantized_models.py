"""Quantized kernels under models that know nothing of them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.helpers.models import LIFTS, inputs, net
from tests.helpers.trees import trained
from tsd_jax.binding.linen import adapted, bind, bind_variables, make_spec
from tsd_jax.core import paths
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.quantization import Quantization, Quantized, dequantize, quantize
from tsd_jax.core.spec import Rule
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import DECODER_RULES, LINEAR_KERNELS, Decoder
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.sharding import make_mesh, param_shardings, state_shardings
from tsd_jax.training.state import create_state
from tsd_jax.training.step import launch_state, make_train_step


def opened(params):
    """Return the same tree in floats."""
    flat = paths.flatten(params)
    return paths.unflatten({path: dequantize(leaf) for path, leaf in flat.items()})


QUICK = ("plain", "scan", "scan on axis 1", "scan of remat", "vmap")


@pytest.mark.parametrize(
    "lift",
    [
        pytest.param(lift, marks=() if lift in QUICK else pytest.mark.slow)
        for lift in LIFTS
    ],
)
def test_the_function_is_that_of_the_floats(lift):
    """Every kind of linear module under every lift, with trained adapters."""
    model, params, spec = net(lift, "lora")
    # Where the scan takes the axis beside the outputs away, no tile may span it.
    tile = 1 if "axis" in lift or lift == "scan of scans" else 2
    some = r"(.*/)?(heads|each|mix|head)/kernel"
    quantized = quantize(params, Quantization(format="int8", tile=tile), some)
    plain, x = opened(quantized), inputs(lift)
    own = make_spec(
        model.apply,
        {"params": quantized},
        [Rule(pattern=r".*/kernel", rank=2, alpha=3, directions=3)],
        x,
        method="lora",
    )
    assert own == spec
    pairs = trained(0, spec, 0.3)
    apply = adapted(model.apply)

    @jax.jit
    def both(quantized, plain, pairs):
        return [apply({"params": bind(base, *pairs)}, x) for base in (quantized, plain)]

    got, want = both(quantized, plain, pairs)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    before = model.apply({"params": params}, x)
    assert np.abs(np.asarray(want - before)).max() > 1e-3


LAYERS, WIDTH, INNER = 3, 32, 48
CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
RULE = Rule(pattern=r"layers/mlp/down_proj/kernel", rank=2, directions=3)


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 40, (1, 4, 7), np.int32)
    weights = np.ones(tokens.shape, np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, 3, -1), "weights": weights}


def decoder(dtype, name="nf4"):
    model = Decoder(CONFIG, dtype, dtype, remat=True)
    tokens = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), shapes
    )
    quantized = quantize(params, Quantization(format=name, tile=16), LINEAR_KERNELS)
    spec = make_spec(model.apply, {"params": quantized}, [RULE], tokens, method="tsd")
    return model, quantized, spec


def test_training_leaves_a_quantized_base_as_it_was():
    """Steps, launch and steps over a mesh, in bfloat16, by one compiled step."""
    model, params, spec = decoder(jnp.bfloat16)
    mesh = make_mesh((2, 2, 2))
    places = param_shardings(params, DECODER_RULES, mesh)
    params = jax.device_put(params, places)
    leaf = params["layers"]["mlp"]["down_proj"]["kernel"]
    shards = leaf.values.addressable_shards[0], leaf.scale.addressable_shards[0]
    # 48 inputs in tiles of 16: the mesh's two ways do not divide three tiles.
    assert [shard.data.shape for shard in shards] == [(3, 24, 16), (3, 3, 16)]
    up = params["layers"]["mlp"]["up_proj"]["kernel"].values
    assert up.addressable_shards[0].data.shape == (3, 8, 24)
    kept = [np.asarray(x) for x in jax.tree.leaves(params)]
    optimizer = make_optimizer(3e-2, 3e-2)
    state = create_state(jax.random.key(1), spec, optimizer)
    at = state_shardings(state, spec, places, mesh)
    state = jax.device_put(state, at)
    step = make_train_step(
        next_token_loss(adapted(model.apply)),
        bind_variables,
        optimizer,
        state_shardings=at,
        param_shardings=places,
    )
    run = step.lower(state, params, batch_of(0), jax.random.key(0)).compile()
    losses = []
    for n in range(6):
        if n == 3:
            state, _ = launch_state(state, params, spec, state_shardings=at)
        state, metrics = run(state, params, batch_of(0), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    assert losses[5] < losses[3]
    for now, then in zip(jax.tree.leaves(params), kept, strict=True):
        np.testing.assert_array_equal(np.asarray(now), then)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("nf4", "u8[3,16,48]"),
        pytest.param("int8", "s8[3,32,48]", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("optimized")
def test_no_stack_of_floats_is_in_the_compiled_step(name, stored):
    model, params, spec = decoder(jnp.float32, name)
    optimizer = make_optimizer(1e-2, 1e-2)
    state = create_state(jax.random.key(1), spec, optimizer)
    step = make_train_step(
        next_token_loss(adapted(model.apply)), bind_variables, optimizer
    )
    lowered = step.lower(state, params, batch_of(0), jax.random.key(0))
    text = lowered.compile().as_text() or ""
    # Nor do the halves of bytes unpack as a stack.
    assert f"u8[{LAYERS},{WIDTH},{INNER}]" not in text
    dense = re.compile(rf"(f32|bf16)\[{LAYERS},({WIDTH},{INNER}|{INNER},{WIDTH})\]")
    assert not dense.search(text)
    assert stored in text
    assert re.search(rf"f32\[(1,)?{WIDTH},{INNER}\]", text)


def test_a_quantized_leaf_is_one_leaf_of_paths_and_shardings():
    _, params, _ = decoder(jnp.float32)
    flat = paths.flatten(params)
    assert sum(isinstance(leaf, Quantized) for leaf in flat.values()) == 7
    places = paths.flatten(param_shardings(params, DECODER_RULES, make_mesh((8, 1, 1))))
    assert places.keys() == flat.keys()
    assert {type(place) for place in places.values()} == {NamedSharding}


def test_a_quantized_leaf_cannot_train_whole():
    model, params, _ = decoder(jnp.float32)
    rules = [RULE, Full(pattern=r"layers/.*/o_proj/kernel")]
    tokens = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(
        InputError, match=r"o_proj/kernel is quantized .* train in full"
    ):
        make_spec(model.apply, {"params": params}, rules, tokens)
