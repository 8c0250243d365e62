"""Compile for a TPU pod that is not there: python -m tests.helpers.tpu_programs FOLDER.

Everything that the devices of a v5e:4x4 slice run for a launch. Writes each program as
lowered (NAME.mlir) and as compiled (NAME.hlo) into FOLDER, and prints what it cost as
one line of JSON. Needs libtpu alone.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# LLaMA-7B's stacks, bfloat16, and what rules of models make of them.
STACKS = {"q": (32, 4096, 4096), "up": (32, 4096, 11008), "down": (32, 11008, 4096)}
MESHES = {"fsdp": (1, 16, 1), "all axes": (2, 4, 2)}
SPREADS = (("q", "all axes"), ("up", "all axes"), ("down", "all axes"), ("up", "fsdp"))
RANK, DIRECTIONS = 8, 8


def described(shape: Any, dtype: Any, mesh: Any, *axes: Any) -> Any:
    """Describe an array and where it lies."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def launch_programs(name: str, mesh: Any) -> dict[str, Any]:
    """Lower what spreads a chunk of a stack, and what joins the hosts' results."""
    import jax
    import jax.numpy as jnp

    from tsd_jax.core.adapter import Adapter, Directions
    from tsd_jax.core.layout import Layout
    from tsd_jax.core.spec import KernelSpec
    from tsd_jax.extraction.chunks import plan_chunks
    from tsd_jax.extraction.launch import (
        Operands,
        Ranking,
        _out_shardings,
        _spread_chunk,
    )

    layers, fan_in, fan_out = STACKS[name]
    axes = ("tensor", "fsdp") if name == "down" else ("fsdp", "tensor")
    kernel = described(STACKS[name], jnp.bfloat16, mesh, None, *axes)
    a: Any = described((layers, fan_in, RANK), jnp.float32, mesh, None, axes[0])
    b: Any = described((layers, RANK, fan_out), jnp.float32, mesh, None, None, axes[1])
    short, start = min(fan_in, fan_out), jax.ShapeDtypeStruct((), jnp.int32)
    noise = jax.ShapeDtypeStruct((layers, short), jnp.float32)
    layout = Layout((0,), (1,), (2,), lifted=(0,))
    plan = plan_chunks(kernel, layout)
    spec = KernelSpec(
        path=name,
        shape=STACKS[name],
        layout=layout,
        rank=RANK,
        alpha=RANK,
        scale=1.0,
        gains=DIRECTIONS,
        ranked=RANK,
        columns=RANK,
        dropout=0.0,
        gated=True,
    )

    def found(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((plan.width, *shape), dtype, sharding=plan.sharding)

    frozen = Directions(
        found(fan_in, RANK), found(fan_out, RANK), found(RANK), found(DIRECTIONS)
    )
    ranking = Ranking(
        found(short),
        found(short),
        found(RANK, dtype=jnp.int32),
        found(1, dtype=jnp.int32),
    )
    results = (
        (
            {"a": found(fan_in, RANK), "b": found(RANK, fan_out), "magnitude": None},
            frozen,
        ),
        ranking,
    )
    places = _out_shardings(Adapter(a, b, None, spec))
    with jax.enable_x64(True):
        return {
            "spread": _spread_chunk.lower(
                Operands(kernel, {"a": a, "b": b, "magnitude": None}, noise, None),
                start,
                plan=plan,
            ),
            "join": plan.joiner(places).lower([results] * len(plan.starts)),
        }


def step_programs(mesh: Any) -> dict[str, Any]:
    """Lower a train step, scanned and rematerialised, before launch and after it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from tsd_jax.binding.linen import adapted, bind_variables, make_spec
    from tsd_jax.core.spec import Rule
    from tsd_jax.evaluation.loss import next_token_loss
    from tsd_jax.models.config import DecoderConfig
    from tsd_jax.models.decoder import DECODER_RULES, Decoder
    from tsd_jax.training import sharding
    from tsd_jax.training.optimizer import make_optimizer
    from tsd_jax.training.state import create_state
    from tsd_jax.training.step import launch_state, make_train_step

    config = DecoderConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    model = Decoder(config, jnp.bfloat16, jnp.bfloat16, remat=True)
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    at = sharding.param_shardings(shapes, DECODER_RULES, mesh)
    rule = Rule(pattern=r".*_proj/kernel", rank=RANK, directions=DIRECTIONS)
    spec = make_spec(model.apply, {"params": shapes}, [rule], tokens, method="tsd")
    optimizer = make_optimizer(1e-3, 1e-3, clip_norm=1.0)
    create = functools.partial(create_state, spec=spec, optimizer=optimizer)
    before = jax.eval_shape(create, jax.random.key(0))
    where = sharding.state_shardings(before, spec, at, mesh)
    with jax.enable_x64(True):
        after = jax.eval_shape(
            lambda state, params: launch_state(state, params, spec)[0], before, shapes
        )
    step = make_train_step(
        next_token_loss(adapted(model.apply)),
        bind_variables,
        optimizer,
        state_shardings=where,
        param_shardings=at,
        batch_shardings=NamedSharding(mesh, sharding.BATCH),
    )
    rows = described((2, 8, 128), jnp.int32, mesh, *sharding.BATCH)
    weights = described((2, 8, 128), jnp.float32, mesh, *sharding.BATCH)
    batch = {"tokens": rows, "targets": rows, "weights": weights}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {
        name: step.lower(state, shapes, batch, key)
        for name, state in (("before", before), ("after", after))
    }


def control_programs(mesh: Any) -> dict[str, Any]:
    """Lower what a launch must not hold, so that looking for it is seen to find it."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    whole = NamedSharding(mesh, PartitionSpec())
    small = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=whole)
    stack = described(STACKS["q"], jnp.bfloat16, mesh, None, "fsdp", "tensor")
    layers = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "tensor")))
    with jax.enable_x64(True):
        wide = jax.jit(lambda x: x.astype(jnp.float64) + 1).lower(small)
    return {
        "svd": jax.jit(jnp.linalg.svd).lower(small),
        "eigh": jax.jit(jnp.linalg.eigh).lower(small),
        "float64": wide,
        "gather": jax.jit(lambda x: x, out_shardings=layers).lower(stack),
    }


def main(folder: str) -> None:
    """Compile all of them."""
    from jax.experimental import topologies

    from tsd_jax.training.sharding import make_mesh

    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4"
    ).devices
    meshes = {name: make_mesh(shape, devices) for name, shape in MESHES.items()}
    programs = {}
    for stack, name in SPREADS:
        lowered = launch_programs(stack, meshes[name])
        programs |= {f"{what} {stack}, {name}": x for what, x in lowered.items()}
    for prefix, lowered in (
        ("step", step_programs(meshes["all axes"])),
        ("control", control_programs(meshes["all axes"])),
    ):
        programs |= {f"{prefix} {what}": x for what, x in lowered.items()}
    figures = {}
    for name, lowered in programs.items():
        (Path(folder) / f"{name}.mlir").write_text(lowered.as_text())
        if name == "step after":  # one executable: compared as lowered
            continue
        begun = time.perf_counter()
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        figures[name] = {
            "seconds": time.perf_counter() - begun,
            "argument": memory.argument_size_in_bytes,
            "output": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        }
        (Path(folder) / f"{name}.hlo").write_text(compiled.as_text())
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    main(*sys.argv[1:])
