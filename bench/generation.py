"""Measure greedy generation against transformers: 64 prompts, 32 new tokens each.

    python bench/generation.py                        ../shared/models/stories3M
    python bench/generation.py FOLDER FOLDER ...      other models

Both continue the same prompts in one batch, in float32 on the CPU, from token ids to
token ids; nothing ends a text. transformers runs as it is fastest here: a left-padded
batch, its cache, and scaled dot-product attention. Ours runs with the layers stacked
and apart, as `tsd.generate` does after its first call, which compiles. Rows alternate
in one process, and medians count. A row of ours is checked against that of transformers
token by token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, NEW, REPEATS = 64, 32, 3
NAMES = ("Tom", "Lily", "Ben", "Sue", "Max", "Anna", "Tim", "Mia")
OPENINGS = (
    "Once upon a time there was a child named {}. Every day",
    "{} went to the park with a big red ball.",
    "One day, {} found a small box under the bed and opened it.",
    "{} was sad because",
    "The sun was warm, and {} wanted to play outside with a friend.",
    "{} and the little dog ran",
    "When {} looked out of the window, there was",
    "In a house by the sea lived {}, who liked",
)


def theirs(folder: Path, rows: list[list[int]]) -> Callable[[], np.ndarray]:
    """Return the function that generates with transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    length = max(map(len, rows))
    tokens, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for n, row in enumerate(rows):
        tokens[n, length - len(row) :] = torch.tensor(row)
        mask[n, length - len(row) :] = 1

    def run() -> np.ndarray:
        with torch.inference_mode():
            made = model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        return made[:, length:].numpy()

    return run


def ours(folder: Path, rows: list[list[int]], scan: bool) -> Callable[[], np.ndarray]:
    """Return the function that generates with this project."""
    import tsd_jax as tsd
    from tsd_jax import huggingface
    from tsd_jax.models.decoder import Decoder

    config = huggingface.read_config(folder)
    params = huggingface.load_params(folder, config, scan_layers=scan)
    apply = Decoder(config, scan_layers=scan).apply
    settings = tsd.Generation(max_new_tokens=NEW)

    def run() -> np.ndarray:
        return np.array(tsd.generate(apply, {"params": params}, rows, settings))

    return run


def measure(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    from tsd_jax import huggingface

    tokenizer = huggingface.load_tokenizer(folder)
    texts = [opening.format(name) for opening in OPENINGS for name in NAMES]
    rows = tokenizer(texts)["input_ids"]
    assert len(rows) == PROMPTS
    runs = {
        "transformers": theirs(folder, rows),
        "ours, layers stacked": ours(folder, rows, True),
        "ours, layers apart": ours(folder, rows, False),
    }
    first, made, seconds = {}, {}, {name: [] for name in runs}
    for name, run in runs.items():
        begun = time.perf_counter()
        made[name] = run()
        first[name] = time.perf_counter() - begun
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    speed = {n: PROMPTS * NEW / statistics.median(s) for n, s in seconds.items()}
    results = []
    for name in runs:
        ratios = [
            b / a for a, b in zip(seconds[name], seconds["transformers"], strict=True)
        ]
        row = {
            "model": folder.name,
            "row": name,
            "first_seconds": first[name],
            "seconds": seconds[name],
            "tokens_per_second": speed[name],
            "over_transformers": statistics.median(ratios),
            "same_texts": int((made[name] == made["transformers"]).all(axis=1).sum()),
        }
        print(
            f"{folder.name:<12} {name:<22} {speed[name]:8.0f} tokens/s"
            f"  x {row['over_transformers']:.2f}"
            f"  {row['same_texts']} of {PROMPTS} texts",
            flush=True,
        )
        results.append(row)
    return results


def facts() -> dict[str, Any]:
    """Return when and on what this was measured."""
    import jax
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = [ROOT.parent / "shared" / "models" / "stories3M"]
    parser.add_argument("folders", nargs="*", type=Path, default=default)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    rows = [row for folder in args.folders for row in measure(folder, args.repeats)]
    result = {"benchmark": "generation", **facts(), "rows": rows}
    if args.repeats >= REPEATS:
        file = ROOT / "bench" / "results" / "generation.json"
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
