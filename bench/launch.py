"""Measure a launch without a cache, in train steps of the same model and machine.

    python bench/launch.py                     the demo model, 26M and 110M parameters
    python bench/launch.py --models demo

Each model takes a few steps of 8 x 128 random tokens with the default rule (q, k, v, up
and down; r = s = 8, LoRA-TSD), then launches twice: first as in a run, including
compilation, then with the programs already compiled. Runs on the devices that JAX
finds, GPU or CPU; all weights but the demo's are random.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

import tsd_jax as tsd
from configs import default, demo
from tsd_jax import huggingface
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import Decoder
from tsd_jax.training.state import create_state
from tsd_jax.training.step import launch_state, make_train_step

BATCH, LENGTH, WARM, STEPS, TARGET = 8, 128, 2, 7, 200


def llama(width: int, inner: int, layers: int, vocabulary: int) -> DecoderConfig:
    """Return the config of a Llama with heads of 64 and tied embeddings."""
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        tie_word_embeddings=True,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "demo": lambda: huggingface.read_config(ROOT / demo.ASSETS / "model"),
    "26M": lambda: llama(512, 1376, 7, 8192),
    "110M": lambda: llama(768, 2048, 12, 32000),
}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a function, and the seconds until it is computed."""
    begun = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - begun


def batches(vocabulary: int) -> dict[str, jax.Array]:
    """Return one batch of random tokens, (1, 8, 128)."""
    shape = (1, BATCH, LENGTH)
    tokens = np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32)
    weights = np.ones(shape, np.float32)
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "weights": weights}
    return jax.device_put(arrays)


def measure(name: str) -> dict[str, Any]:
    """Train a few steps and launch twice; return the times of each."""
    config = MODELS[name]()
    model = Decoder(config)
    batch, key = batches(config.vocab_size), jax.random.key(0)
    if name == "demo":
        params = huggingface.load_params(ROOT / demo.ASSETS / "model", config)
    else:
        params = jax.jit(model.init)(key, batch["tokens"][0])["params"]
    rule = default.get_config().adapter
    rules = [tsd.Rule(pattern=rule.pattern, rank=rule.rank, directions=rule.directions)]
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    spec = tsd.make_spec(model.apply, {"params": params}, rules, tokens, method="tsd")
    optimizer = tsd.make_optimizer(1e-3, 1e-3)
    state = jax.jit(functools.partial(create_state, spec=spec, optimizer=optimizer))(
        key
    )
    step = make_train_step(
        next_token_loss(tsd.adapted(model.apply)), tsd.bind_variables, optimizer
    )
    program, compile_step = timed_compile(step, state, params, batch, key)
    seconds = []
    for _ in range(WARM + STEPS):
        run = functools.partial(program, state, params, batch, key)
        (state, _), took = timed(run)
        seconds.append(took)
    launching = functools.partial(launch_state, state, params, spec)
    first, again = (timed(launching)[1] for _ in range(2))
    one = statistics.median(seconds[WARM:])
    shapes = {(k.shape, k.layout, k.scale) for k in spec.kernels}
    return {
        "model": name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "matrices": sum(int(np.prod(k.batch_shape)) for k in spec.kernels),
        "kernel_shapes": len(shapes),
        "step_seconds": one,
        "step_compile_seconds": compile_step,
        "launch_seconds": again,
        "launch_compile_seconds": first - again,
        "steps": again / one,
        "steps_with_compilation": first / one,
    }


def timed_compile(step: Any, *arguments: Any) -> tuple[Any, float]:
    """Compile ahead of time; return the program and the seconds it took."""
    begun = time.perf_counter()
    return step.lower(*arguments).compile(), time.perf_counter() - begun


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    print(
        f"{row['model']:<6} {row['parameters']:>12,} {row['matrices']:>9}"
        f" {row['step_seconds']:>7.3f} s {row['launch_seconds']:>7.2f} s"
        f" {row['steps']:>8.1f} {row['launch_compile_seconds']:>7.2f} s"
        f" {row['steps_with_compilation']:>16.1f}",
        flush=True,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{'model':<6} {'parameters':>12} {'matrices':>9} {'step':>9} {'launch':>9}"
        f" {'= steps':>8} {'compile':>9} {'= steps with it':>16}"
    )
    rows = []
    for name in args.models:
        rows.append(measure(name))
        print_row(rows[-1])
    result = {
        "benchmark": "launch",
        "device": f"{jax.device_count()} x {device.device_kind}",
        "batch": [BATCH, LENGTH],
        "target_steps": TARGET,
        "rows": rows,
    }
    name = "launch" if device.platform == "cpu" else f"launch_{device.platform}"
    if args.models == list(MODELS):
        file = ROOT / "bench" / "results" / f"{name}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
