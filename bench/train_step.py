"""Measure a train step beside Hugging Face PEFT and the authors' LoRA-Dash.

    python bench/train_step.py                            all models and rows
    python bench/train_step.py --models 25M --rounds 1 --rows compiled lora tsd
    python bench/train_step.py --markdown                 the table of what was stored

PEFT is as fast as it gets: scaled dot-product attention, fused AdamW, all cores; eager,
compiled and with gradient checkpointing. The authors' procedure is that of their code
after its launch, on top of PEFT. Ours is a step as `train.py` takes it, without and
with remat. All train LoRA on the seven linears of a Llama, in float32 on the CPU.

Every row of every round is a process of its own, and rows alternate. Memory is the
peak of the whole process (VmHWM), imports and compilation included. The peak of the
machine is that of a float32 product of 2048 x 2048, by torch or JAX, measured in every
round. "instructions" is real data: ARC-Easy, completion-only, 8 examples a step. PEFT
pads to the longest of a batch, ours to the next multiple of 32, a program for each
(`train.py` pads to data.length), with the head where tokens count; steps are timed when
their batches come again.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "bench" / "results" / "train_step.json"
INSTRUCTIONS = SHARED / "data" / "commonsense" / "ARC-Easy" / "train.json"
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
RATE, DIRECTIONS, LONGEST, MULTIPLE = 1e-3, 8, 256, 32
PEFT = ("eager", "compiled", "checkpointed")
OURS = ("lora", "dash", "tsd", "dora", "lora, remat", "tsd, remat")
ROWS = (*PEFT, "authors", *OURS)


class Case(NamedTuple):
    """A model, and what it trains on.

    Attributes:
      sizes: width, inner width, layers, heads, key and value heads, vocabulary.
      tied: whether the embedding is the head as well.
      batch: examples of a step. length: tokens of an example. rank: of the adapters.
      folder: of weights and tokenizer, or None.
      instructions: whether it trains on instruction data.
    """

    sizes: tuple[int, int, int, int, int, int]
    tied: bool
    batch: int
    length: int
    rank: int
    folder: Path | None = None
    instructions: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields of config.json."""
        width, inner, layers, heads, kv_heads, vocabulary = self.sizes
        return {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width // heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": self.tied,
        }

    def flops(self) -> float:
        """Count what a LoRA step must compute: 4 x parameters x tokens and attention.

        Forward, and backward to the inputs; causal attention has no upper half.
        """
        width, inner, layers, heads, kv_heads, vocabulary = self.sizes
        attention = 2 * width * width * (1 + kv_heads / heads)
        parameters = layers * (attention + 3 * width * inner) + width * vocabulary
        tokens = self.batch * self.length
        return 4.0 * parameters * tokens + 6.0 * tokens * self.length * width * layers


SMOLLM2 = (576, 1536, 30, 9, 3, 49152)
CASES = {
    "stories3M": Case((192, 512, 6, 6, 2, 4096), True, 8, 256, 8),
    "25M": Case((288, 768, 6, 6, 6, 32000), False, 8, 256, 8),
    "SmolLM2": Case(SMOLLM2, True, 4, 256, 16),
    "instructions": Case(SMOLLM2, True, 8, LONGEST, 16, instructions=True),
}


def instruction_rows(case: Case, count: int) -> tuple[dict[str, np.ndarray], int]:
    """Return encoded examples of ARC-Easy, and the most tokens of one that count."""
    from tsd_jax import huggingface
    from tsd_jax.data.encoding import encode_examples
    from tsd_jax.data.sources import read_instructions
    from tsd_jax.data.templates import plain
    from tsd_jax.evaluation.chunked_loss import most_counted

    if case.folder is None or not INSTRUCTIONS.is_file():
        sys.exit(
            "instructions need --smollm2 FOLDER, a tokenizer, and " + str(INSTRUCTIONS)
        )
    tokenizer: Any = huggingface.load_tokenizer(case.folder)
    records = read_instructions(INSTRUCTIONS)
    arrays = encode_examples(records, tokenizer, plain, case.length).arrays
    order = np.random.default_rng(0).permutation(len(arrays["tokens"]))[:count]
    counted = most_counted(arrays["weights"])
    return {name: array[order] for name, array in arrays.items()}, counted


def batches(case: Case, steps: int) -> tuple[list[dict[str, np.ndarray]], int | None]:
    """Return the batch of every step, and how many tokens of a row count at most.

    Those of instructions come twice: the first time a length may compile a program.
    """
    rows, counted = case.batch * steps, None
    if case.instructions:
        arrays, counted = instruction_rows(case, rows)
    else:
        tokens = np.random.default_rng(0).integers(
            case.sizes[-1], size=(rows, case.length + 1), dtype=np.int32
        )
        arrays: dict[str, Any] = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((rows, case.length), np.float32),
        }
    cut = range(0, rows, case.batch)
    data = [
        {name: array[n : n + case.batch] for name, array in arrays.items()} for n in cut
    ]
    return (2 * data if case.instructions else data), counted


def padded(batch: dict[str, np.ndarray], multiple: int) -> dict[str, np.ndarray]:
    """Cut a batch to its longest example, rounded up to a multiple."""
    longest = int(np.flatnonzero(batch["weights"].any(axis=0)).max()) + 1
    end = -(-longest // multiple) * multiple
    return {name: array[:, :end] for name, array in batch.items()}


def add_dash(model: Any) -> list[Any]:
    """Add the authors' second branch to every layer of PEFT's; return what trains.

    After launch their forward adds dropout(x) (U diag(s) V^T)^T, a matrix as large as
    the kernel that is formed at every call. U and V are random here: their values do
    not change the time of a step.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from peft.tuners.lora import Linear  # pyright: ignore[reportMissingImports]

    def hook(layer: Any, args: Any, output: Any) -> Any:
        change = layer.dash_u @ torch.diag(layer.dash_s) @ layer.dash_v
        return output + torch.nn.functional.linear(args[0], change)

    trained = []
    layers: list[Any] = [each for each in model.modules() if isinstance(each, Linear)]
    for layer in layers:
        layer.dash_u = torch.linalg.qr(torch.randn(layer.out_features, DIRECTIONS))[0]
        layer.dash_v = torch.linalg.qr(torch.randn(layer.in_features, DIRECTIONS))[0].T
        layer.dash_s = torch.nn.Parameter(torch.zeros(DIRECTIONS))
        layer.register_forward_hook(hook)
        trained.append(layer.dash_s)
    return trained


def theirs(case: Case, row: str, steps: int) -> Iterator[float]:
    """Take steps with PEFT; yield the loss of each."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    how: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if case.folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(case.folder, **how)
    else:
        config = transformers.AutoConfig.for_model(**case.fields())
        model = transformers.AutoModelForCausalLM.from_config(config, **how)
    model.config.use_cache = False
    if row == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    names = [f"{name}_proj" for name in TARGETS]
    lora = peft.LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, target_modules=names, lora_dropout=0.0
    )
    adapted: Any = peft.get_peft_model(model, lora).train()
    if row == "authors":
        add_dash(adapted)
    trained = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    if row == "compiled":
        adapted = torch.compile(adapted, dynamic=case.instructions or None)
    for batch in batches(case, steps)[0]:
        used = padded(batch, 1) if case.instructions else batch
        labels = np.where(used["weights"] > 0, used["targets"], -100)
        labels = np.insert(labels, 0, -100, axis=1)  # their loss looks one ahead
        tokens = np.insert(used["targets"], 0, used["tokens"][:, 0], axis=1)
        end = None if case.instructions else case.length
        result = adapted(
            input_ids=torch.from_numpy(tokens[:, :end]).long(),
            labels=torch.from_numpy(labels[:, :end]).long(),
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield result.loss.item()


def ours(case: Case, row: str, steps: int) -> Iterator[float]:
    """Take steps with this project; yield the loss of each."""
    import jax
    import jax.numpy as jnp

    import tsd_jax as tsd
    from tsd_jax import huggingface
    from tsd_jax.evaluation.chunked_loss import SplitModel, chunked_next_token_loss
    from tsd_jax.models.config import DecoderConfig
    from tsd_jax.models.decoder import Decoder, head_name, make_head
    from tsd_jax.training.optimizer import make_optimizer
    from tsd_jax.training.state import create_state
    from tsd_jax.training.step import make_train_step

    if case.folder is not None:
        config = huggingface.read_config(case.folder)
        params = huggingface.load_params(case.folder, config)
    else:
        config, params = DecoderConfig(**case.fields()), None
    method, _, remat = row.partition(", ")
    model = Decoder(config, remat=bool(remat))
    if params is None:
        few = jnp.zeros((1, 8), jnp.int32)
        params = jax.jit(model.init)(jax.random.key(0), few)["params"]
    rule = tsd.Rule(
        pattern=r"layers/.*_proj/kernel",
        rank=case.rank,
        alpha=2.0 * case.rank,
        directions=DIRECTIONS,
        dora=method == "dora",
    )
    method = "lora" if method == "dora" else method
    tokens = jnp.zeros((case.batch, case.length), jnp.int32)
    spec = tsd.make_spec(model.apply, {"params": params}, [rule], tokens, method=method)
    optimizer = make_optimizer(RATE, RATE)
    state = create_state(jax.random.key(0), spec, optimizer, params=params)
    name = head_name(config)
    tied = config.tie_word_embeddings
    apply = tsd.adapted(model.apply)

    def hidden(variables: Any, tokens: Any) -> Any:
        used = variables["params"]
        rest = {k: v for k, v in used.items() if tied or k != name}
        return apply({**variables, "params": rest}, tokens, head=False)

    split = SplitModel(
        hidden=hidden,
        head=make_head(model),
        head_variables=lambda variables: {"params": {name: variables["params"][name]}},
        vocabulary=config.vocab_size,
    )
    data, counted = batches(case, steps)
    loss = chunked_next_token_loss(split, counted=counted)
    step = make_train_step(loss, tsd.bind_variables, optimizer)
    key = jax.random.key(1)
    for batch in data:
        used = padded(batch, MULTIPLE) if case.instructions else batch
        stacked = {name: array[None] for name, array in used.items()}
        state, metrics = step(state, params, stacked, key)
        yield float(metrics["loss"])


def matmul_peak() -> float:
    """Return the most float32 operations a second of torch's and JAX's products."""
    import jax
    import jax.numpy as jnp
    import torch  # pyright: ignore[reportMissingImports]

    size = 2048
    torch.set_num_threads(os.cpu_count() or 1)
    of_torch = torch.ones(size, size)
    of_jax = jnp.ones((size, size))
    runs: list[Callable[[], Any]] = [
        lambda: of_torch @ of_torch,
        lambda: jax.block_until_ready(of_jax @ of_jax),
    ]
    best = float("inf")
    for run, _ in itertools.product(runs, range(6)):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def peak_memory() -> int:
    """Return the most memory that this process held, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def child(case: Case, row: str, steps: int) -> dict[str, Any]:
    """Run one row in this process and return its figures."""
    if row == "machine":
        return {"flops": matmul_peak()}
    took: list[float] = []
    losses: list[float] = []
    begun = time.perf_counter()
    run = theirs if row in (*PEFT, "authors") else ours
    for loss in run(case, row, steps if case.instructions else steps + 1):
        now = time.perf_counter()
        took.append(now - begun)
        losses.append(loss)
        begun = now
    return {
        "first": took[0],
        "seconds": took[-steps:],
        "peak_bytes": peak_memory(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def spawn(args: argparse.Namespace, name: str, row: str) -> dict[str, Any]:
    """Run one row in a process of its own."""
    command = [*shlex.split(args.through), sys.executable, __file__, "--row", row]
    command += ["--models", name, "--steps", str(args.steps)]
    if args.smollm2:
        command += ["--smollm2", str(args.smollm2)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(name: str, case: Case, runs: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the table of one model from the figures of all rounds."""
    machine = max(each["flops"] for each in runs["machine"])
    middle = statistics.median
    rows = []
    for row in [row for row in ROWS if row in runs]:
        # Batches of instructions differ, so the mean of a process counts there.
        of_process = statistics.fmean if case.instructions else middle
        seconds = middle(of_process(each["seconds"]) for each in runs[row])
        found = {
            "model": name,
            "row": row,
            "seconds": seconds,
            "examples_per_second": case.batch / seconds,
            "tokens_per_second": case.batch * case.length / seconds,
            "peak_bytes": middle(each["peak_bytes"] for each in runs[row]),
            "first_seconds": middle(each["first"] for each in runs[row]),
            "first_loss": runs[row][0]["first_loss"],
            "share_of_peak": case.flops() / seconds / machine,
            "rounds": [each["seconds"] for each in runs[row]],
        }
        if case.instructions:  # what is padding depends on the row
            found["tokens_per_second"] = found["share_of_peak"] = None
        rows.append(found)
    of_peft = [found for found in rows if found["row"] in PEFT]
    for found in rows if of_peft else []:
        fastest = min(each["seconds"] for each in of_peft)
        smallest = min(each["peak_bytes"] for each in of_peft)
        found["over_fastest"] = fastest / found["seconds"]
        found["memory_of_smallest"] = found["peak_bytes"] / smallest
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of the pages."""
    lines = []
    for name, rows in itertools.groupby(result["rows"], key=lambda row: row["model"]):
        lines += [
            f"\n{name}:\n",
            "| | tokens/s | examples/s | of PEFT's fastest | peak MiB "
            "| of PEFT's smallest | first step, s | of the matmul peak |",
            "|---|" + "---:|" * 7,
        ]
        for row in rows:
            who = "ours" if row["row"] in OURS else "PEFT"
            tokens, share = row["tokens_per_second"], row["share_of_peak"]
            lines.append(
                f"| {who}, {row['row']} "
                f"| {'' if tokens is None else f'{tokens:.0f}'} "
                f"| {row['examples_per_second']:.2f} "
                f"| {row.get('over_fastest', float('nan')):.2f} "
                f"| {row['peak_bytes'] / 2**20:.0f} "
                f"| {row.get('memory_of_smallest', float('nan')):.2f} "
                f"| {row['first_seconds']:.1f} "
                f"| {'' if share is None else f'{share:.2f}'} |"
            )
    return "\n".join(lines).strip()


def facts() -> dict[str, Any]:
    """Return when and on what this was measured."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    packages = ("jax", "torch", "peft", "transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in packages},
    }


def stored() -> dict[str, Any]:
    """Return what was measured before, or an empty result."""
    if RESULTS.is_file():
        return json.loads(RESULTS.read_text())
    return {"benchmark": "train_step", "machine_flops": {}, "rows": []}


def measure(args: argparse.Namespace, cases: dict[str, Case]) -> None:
    """Measure the models asked for, and store their tables beside those of others."""
    for name in args.models:
        runs: dict[str, list[Any]] = {}
        for _ in range(args.rounds):
            for row in ("machine", *args.rows):
                runs.setdefault(row, []).append(figures := spawn(args, name, row))
                print(name, row, figures, file=sys.stderr, flush=True)
        result = stored() | facts()
        rows = summary(name, cases[name], runs)
        result["machine_flops"][name] = max(each["flops"] for each in runs["machine"])
        result["rows"] = [row for row in result["rows"] if row["model"] != name] + rows
        print(markdown({"rows": rows}), flush=True)
        if not args.dry:
            RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="after the first")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2's weights")
    parser.add_argument("--through", default="", help="command that starts a row")
    parser.add_argument("--dry", action="store_true", help="store nothing")
    parser.add_argument("--markdown", action="store_true", help="print what is stored")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    folders: dict[str, Any] = {"SmolLM2": args.smollm2, "instructions": args.smollm2}
    stories = SHARED / "models" / "stories3M"
    folders["stories3M"] = stories if stories.is_dir() else None
    cases = {
        name: case._replace(folder=folders.get(name)) for name, case in CASES.items()
    }
    if args.markdown:
        print(markdown(stored()))
    elif args.row:
        print(json.dumps(child(cases[args.models[0]], args.row, args.steps)))
    else:
        measure(args, cases)


if __name__ == "__main__":
    main()
