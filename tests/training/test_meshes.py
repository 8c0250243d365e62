"""Whole runs, launch included, on eight devices as on one."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from tests.helpers.compiled import optimized
from tests.helpers.trees import filled
from tsd_jax.binding.linen import adapted, bind_variables, make_spec
from tsd_jax.core import paths
from tsd_jax.core.full_params import Full
from tsd_jax.core.spec import Rule, Spec
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.extraction.launch import launch
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import DECODER_RULES, Decoder
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.sharding import (
    BATCH,
    make_mesh,
    param_shardings,
    place_batch,
    state_shardings,
)
from tsd_jax.training.state import TrainState, create_state
from tsd_jax.training.step import launch_state, make_train_step

CONFIG = DecoderConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
)
RULES = [
    Rule(pattern=r".*/(q|o)_proj/kernel", rank=3, directions=2),
    Rule(pattern=r".*/down_proj/kernel", rank=3, directions=2, dora=True),
    Full(pattern="embed_tokens/embedding", rows=(20, 24)),
    Full(pattern=r".*/scale"),
    Full(pattern=r".*/up_proj/kernel"),
]
STEPS, LAUNCH, KEY = 6, 3, jax.random.key(0)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
meshes = pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))


class Placed(NamedTuple):
    """What a run needs, on its mesh."""

    mesh: Mesh
    spec: Spec
    params: Any
    state: TrainState
    shardings: TrainState
    step: Any


def batch(step: int, mesh: Mesh) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    tokens = rng.integers(24, size=(2, 8, 6), dtype=np.int32)
    weights = rng.integers(2, size=tokens.shape).astype(np.float32)
    arrays = {"tokens": tokens, "targets": (5 * tokens + 1) % 24, "weights": weights}
    return place_batch(arrays, mesh)


def place(shape: tuple[int, int, int], devices: int = 8) -> Placed:
    mesh = make_mesh(shape, jax.devices()[:devices])
    model = Decoder(CONFIG, remat=True)
    tokens = jax.ShapeDtypeStruct((2, 6), np.int32)
    shapes = jax.eval_shape(model.init, KEY, tokens)["params"]
    at = param_shardings(shapes, DECODER_RULES, mesh)
    params = jax.device_put(filled(0, shapes, 0.3), at)
    spec = make_spec(model.apply, {"params": shapes}, RULES, tokens, method="tsd")
    optimizer = make_optimizer(1e-2, 2e-2, clip_norm=1.0)

    def create(params: Any) -> TrainState:
        return create_state(KEY, spec, optimizer, params=params)

    where = state_shardings(jax.eval_shape(create, params), spec, at, mesh)
    state = jax.jit(create, out_shardings=where)(params)
    step = make_train_step(
        next_token_loss(adapted(model.apply)),
        bind_variables,
        optimizer,
        state_shardings=where,
        param_shardings=at,
        batch_shardings=NamedSharding(mesh, BATCH),
    )
    return Placed(mesh, spec, params, state, where, step)


class Finished(NamedTuple):
    losses: list[float]
    indices: dict[str, np.ndarray]
    placed: Placed
    program: str


@functools.cache
def run(shape: tuple[int, int, int], devices: int = 8) -> Finished:
    """Train through the launch; one executable, compiled ahead, takes every state."""
    placed = place(shape, devices)
    mesh, spec, params, state, shardings, step = placed
    with optimized():
        program = step.lower(state, params, batch(0, mesh), KEY).compile()
    losses, indices = [], {}
    for n in range(STEPS):
        if n == LAUNCH:
            state, report = launch_state(state, params, spec, state_shardings=shardings)
            indices = {k: np.asarray(ranking.indices) for k, ranking in report.items()}
        state, metrics = program(state, params, batch(n, mesh), KEY)
        losses.append(float(metrics["loss"]))
    return Finished(losses, indices, placed._replace(state=state), text(program))


@meshes
def test_losses_are_those_of_one_device(shape):
    one, many = run((1, 1, 1), 1), run(shape)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
    chex.assert_trees_all_equal(many.indices, one.indices)
    assert one.losses[LAUNCH - 1] < one.losses[0]
    assert one.losses[LAUNCH] > one.losses[LAUNCH - 1]  # tsd drops what it learned


# How DECODER_RULES cut these kernels: {mesh: {kernel: shape of one device's part}}.
PARTS = {
    (8, 1, 1): {
        "embed_tokens/embedding": (24, 16),
        "layers/self_attn/q_proj/kernel": (2, 16, 16),
        "layers/self_attn/o_proj/kernel": (2, 16, 16),
        "layers/mlp/up_proj/kernel": (2, 16, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 16),
        "norm/scale": (16,),
    },
    (1, 8, 1): {
        "embed_tokens/embedding": (24, 2),
        "layers/self_attn/q_proj/kernel": (2, 2, 16),
        "layers/self_attn/o_proj/kernel": (2, 16, 2),
        "layers/mlp/up_proj/kernel": (2, 2, 24),
        "layers/mlp/down_proj/kernel": (2, 24, 2),
        "norm/scale": (16,),
    },
    (2, 2, 2): {
        "embed_tokens/embedding": (12, 8),
        "layers/self_attn/q_proj/kernel": (2, 8, 8),
        "layers/self_attn/o_proj/kernel": (2, 8, 8),
        "layers/mlp/up_proj/kernel": (2, 8, 12),
        "layers/mlp/down_proj/kernel": (2, 12, 8),
        "norm/scale": (16,),
    },
}


@meshes
def test_the_base_lies_where_the_rules_put_it(shape):
    """After the whole run, read off the arrays on every device."""
    flat = paths.flatten(run(shape).placed.params)
    for path, part in PARTS[shape].items():
        shards = flat[path].addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert {shard.data.shape for shard in shards} == {part}


@meshes
def test_state_stays_where_it_was_put(shape):
    """Moments and frozen factors beside their kernel, before launch and after."""
    placed = run(shape).placed
    pairs = zip(
        jax.tree.leaves(placed.state), jax.tree.leaves(placed.shardings), strict=True
    )
    for leaf, sharding in pairs:
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    q = placed.state.trainable.adapters["layers/self_attn/q_proj/kernel"]
    data, fsdp, tensor = shape
    del data
    assert q.a.addressable_shards[0].data.shape == (2, 16 // fsdp, 3)
    assert q.b.addressable_shards[0].data.shape == (2, 3, 16 // tensor)
    up = placed.state.trainable.full["layers/mlp/up_proj/kernel"].value
    assert up.addressable_shards[0].data.shape == (2, 16 // fsdp, 24 // tensor)
    rows = placed.state.trainable.full["embed_tokens/embedding"].value
    assert rows.addressable_shards[0].data.shape == (4, 16 // fsdp)
    down = placed.state.trainable.adapters["layers/mlp/down_proj/kernel"]
    assert down.magnitude.addressable_shards[0].data.shape == (2, 16 // fsdp)


def text(program: Any) -> str:
    return program.as_text()


HOST = re.compile(
    r"infeed|outfeed|\bsend\(|\brecv\(|callback|S\(5\)|MoveToHost|is_host"
)


@meshes
def test_no_program_talks_to_the_host(shape):
    """Neither the step nor launch brings a kernel, or anything else, to the host."""
    finished = run(shape)
    placed = finished.placed
    with jax.enable_x64(True), optimized():
        launching = jax.jit(
            lambda params, trainable: launch(params, trainable, placed.spec)
        )
        program = launching.lower(placed.params, placed.state.trainable).compile()
    for compiled in (finished.program, text(program)):
        assert not HOST.search(compiled)
    called = re.findall(r'custom_call_target="([^"]*)"', text(program))
    assert "lapack_dsyevd_ffi" in called
    others = {name for name in called if not name.startswith("lapack_d")}
    assert others <= {"TopK", "Sharding"}


@meshes
def test_no_step_gathers_a_whole_stack_of_kernels(shape):
    """A layer at a time, inside the scan; q's stack and the larger ones.

    What is gathered of the batch, (8, 6, ...), is no kernel.
    """
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", run(shape).program)
    kernels = [dims for dims in gathered if not dims.startswith("8,6,")]
    sizes = [int(np.prod([int(n) for n in dims.split(",")])) for dims in kernels]
    assert max(sizes, default=0) < CONFIG.num_hidden_layers * CONFIG.hidden_size**2
