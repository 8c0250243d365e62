"""Measure training with a base model in float32, bfloat16, int8 and nf4.

    python bench/quantization.py
    python bench/quantization.py --repeats 1       a short run, which keeps no results

A random decoder of 8 scanned layers with remat; LoRA-TSD on q, k, v, up and down. One
process measures all formats: bytes of the base model and of its linear kernels,
temporary memory of the compiled step, and the median time of a step, as ratios to
float32 and bfloat16. Computation is float32 for the float32 base and bfloat16 for the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PATTERN = r"layers/(self_attn|mlp)/(q|k|v|up|down)_proj/kernel"
REPEATS = 5
# {name: (dtype, quantization)}.
FORMATS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
    "nf4": ("bfloat16", "nf4"),
}


def problem(dtype: str, quantization: str | None) -> tuple[Any, Any, Any]:
    """Return a model, its random parameters and a spec."""
    import jax
    import jax.numpy as jnp

    import tsd_jax as tsd
    from tsd_jax.models.config import DecoderConfig
    from tsd_jax.models.decoder import LINEAR_KERNELS, Decoder

    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    model = Decoder(config, jnp.dtype(dtype), jnp.dtype(dtype), remat=True)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params: Any = jax.tree.map(
        lambda x: jnp.asarray(0.04 * rng.standard_normal(x.shape, np.float32), x.dtype),
        shapes,
    )
    if quantization is not None:
        params = tsd.quantize(params, quantization, LINEAR_KERNELS)
    rules = [tsd.Rule(pattern=PATTERN, rank=8, directions=8)]
    spec = tsd.make_spec(model.apply, {"params": params}, rules, tokens, method="tsd")
    return model, params, spec


def sizes(params: Any) -> tuple[int, int]:
    """Return the bytes of all parameters, and those of the linear kernels."""
    import re

    from tsd_jax.core import paths
    from tsd_jax.models.decoder import LINEAR_KERNELS

    flat = paths.flatten(params)
    linear = [
        x.nbytes for path, x in flat.items() if re.fullmatch(LINEAR_KERNELS, path)
    ]
    return sum(x.nbytes for x in flat.values()), sum(linear)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Train a few steps with one format of the base model."""
    import jax

    import tsd_jax as tsd
    from tsd_jax.evaluation.loss import next_token_loss
    from tsd_jax.training.state import create_state
    from tsd_jax.training.step import make_train_step

    model, params, spec = problem(*FORMATS[name])
    optimizer = tsd.make_optimizer(1e-3, 1e-3)
    state = create_state(jax.random.key(1), spec, optimizer)
    step = make_train_step(
        next_token_loss(tsd.adapted(model.apply)), tsd.bind_variables, optimizer
    )
    tokens = np.random.default_rng(1).integers(0, 4096, (1, 4, 128), np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "weights": np.ones(tokens.shape, np.float32),
    }
    key = jax.random.key(2)
    compiled = step.lower(state, params, batch, key).compile()
    seconds, metrics = [], {}
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, params, batch, key))
        seconds.append(time.perf_counter() - begun)
    base, linear = sizes(params)
    return {
        "base": name,
        "base_bytes": base,
        "linear_bytes": linear,
        "step_temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "step_seconds": statistics.median(seconds[1:]),
        "loss": float(metrics["loss"]),
    }


def compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add ratios to the rows of float32 and bfloat16 (itself until that is there)."""
    half = rows[min(1, len(rows) - 1)]
    row["linear_of_float32"] = row["linear_bytes"] / rows[0]["linear_bytes"]
    row["step_time_of_float32"] = row["step_seconds"] / rows[0]["step_seconds"]
    row["step_time_of_bfloat16"] = row["step_seconds"] / half["step_seconds"]


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    print(
        f"{row['base']:<9} base {row['base_bytes'] / 2**20:6.1f} MiB"
        f"  linear {row['linear_bytes'] / 2**20:6.1f} MiB"
        f" ({row['linear_of_float32']:.3f} of float32)"
        f"  step {row['step_seconds']:6.3f} s"
        f" ({row['step_time_of_float32']:.2f} of float32)"
        f"  temporary {row['step_temporary_bytes'] / 2**20:6.1f} MiB"
        f"  loss {row['loss']:.4f}",
        flush=True,
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="after the first step"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        rows.append(measure(name, args.repeats))
        compare(rows[-1], rows)
        print_row(rows[-1])
    result = {"benchmark": "quantization", "device": args.device, "rows": rows}
    name = "quantization" if args.device == "cpu" else f"quantization_{args.device}"
    if args.repeats == REPEATS:
        file = ROOT / "bench" / "results" / f"{name}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
