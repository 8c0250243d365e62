"""Make the demo's assets: tokenizer, pretrained model, and the two files of the task.

    python -m examples.village.make                  overwrites tsd_jax/demo/assets
    python -m examples.village.make --folder DIR     writes them to DIR

Takes a few minutes on two CPU cores, needs only this package, and writes the same files
again on the same machine. `world` generates the text and the task, `tokenizer` is
trained on that text, and `pretraining` trains the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.village import pretraining, world
from examples.village.tokenizer import save_tokenizer, train_tokenizer
from tsd_jax import huggingface
from tsd_jax.data.encoding import encode_choices
from tsd_jax.data.sources import Record, read_instructions
from tsd_jax.data.templates import plain
from tsd_jax.evaluation.loss import sequence_log_likelihood
from tsd_jax.evaluation.scoring import choices
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import Decoder

ASSETS = Path(__file__).parents[2] / "tsd_jax/demo/assets"
SEED = 0
VOCABULARY = 1536
CONTEXT = 128
SCHEDULE = pretraining.Schedule(
    steps=600,
    batch_size=32,
    length=64,
    learning_rate=0.02,
    other_learning_rate=0.006,
    weight_decay=0.05,
)


def make_config(vocab_size: int) -> DecoderConfig:
    """Return the model's config: half a million parameters."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )


def tokenizer_texts(people: list[world.Villager]) -> list[str]:
    """Return the text that the tokenizer is trained on: every sentence a few times."""
    return [text for n in range(4) for text in world.documents(people, SEED + n)]


def token_ids(tokenizer: Any, people: list[world.Villager]) -> Iterator[list[int]]:
    """Yield the encoded documents endlessly, worded differently in each pass."""
    for number in itertools.count():
        texts = world.documents(people, SEED + number)
        for ids in tokenizer(texts)["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def accuracy(
    model: Decoder, params: Any, tokenizer: Any, records: list[Record]
) -> float:
    """Return the fraction of records whose correct option is the most likely one."""
    encoded = encode_choices(records, tokenizer, plain, 32)
    apply: Callable[..., Any] = model.apply
    score_fn = sequence_log_likelihood(apply)
    scored = choices(
        score_fn,
        {"params": params},
        encoded.arrays,
        encoded.groups,
        encoded.labels,
        256,
    )
    return scored["accuracy"]


def knowledge(
    model: Decoder, params: Any, tokenizer: Any, people: list[world.Villager]
) -> dict[str, float]:
    """Return for each kind of fact the fraction of villagers whose fact is known."""
    figures = {}
    for fact in world.FACTS:
        items = world.knowledge_items(people, fact)
        records = [Record(**item) for item in items]
        figures[fact.field] = accuracy(model, params, tokenizer, records)
    return figures


def write_task(folder: Path, people: list[world.Villager]) -> None:
    """Write the training and test items of the task, one item per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in zip(("train", "test"), world.task_items(people), strict=True):
        lines = ",\n".join(json.dumps(item) for item in items)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def make_model(folder: Path, people: list[world.Villager]) -> None:
    """Train tokenizer and model, and write them in Hugging Face's format."""
    tokenizer = train_tokenizer(tokenizer_texts(people), VOCABULARY)
    save_tokenizer(tokenizer, folder, CONTEXT)
    config = make_config(len(tokenizer))
    model = Decoder(config)
    pad = tokenizer.pad_token_id

    def report(step: int, loss: float, params: Any) -> None:
        known = knowledge(model, params, tokenizer, people[:64])
        figures = "  ".join(f"{name} {value:.2f}" for name, value in known.items())
        print(f"step {step:>5}  loss {loss:.3f}  known: {figures}", flush=True)

    rows = pretraining.pack(token_ids(tokenizer, people), SCHEDULE.length, pad)
    data = pretraining.batches(rows, SCHEDULE.batch_size, pad)
    params = pretraining.pretrain(model, data, SCHEDULE, jax.random.key(SEED), report)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
    }
    huggingface.write_checkpoint(
        folder, config, params, dtype=jnp.bfloat16, extra=special
    )
    text = json.dumps(special, indent=2)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def check(folder: Path, people: list[world.Villager]) -> dict[str, float]:
    """Load the assets, and measure what the model knows and how it does the task."""
    source = folder / "model"
    config = huggingface.read_config(source)
    params = huggingface.load_params(source, config, dtype=jnp.float32)
    tokenizer, model = huggingface.load_tokenizer(source), Decoder(config)
    figures = knowledge(model, params, tokenizer, people)
    items = read_instructions(folder / "task" / "test.json")
    return figures | {"task": accuracy(model, params, tokenizer, items)}


def main() -> None:
    """Make all assets in a folder."""
    parser = argparse.ArgumentParser(description="Make the demo's assets.")
    parser.add_argument("--folder", type=Path, default=ASSETS, help="to write to")
    folder = parser.parse_args().folder
    people = world.villagers()
    shutil.rmtree(folder / "model", ignore_errors=True)
    write_task(folder / "task", people)
    make_model(folder / "model", people)
    for name, value in check(folder, people).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
