"""Generation against rereading everything at every step, on a small random Llama."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tsd_jax as tsd
from tsd_jax import huggingface
from tsd_jax.core.errors import InputError
from tsd_jax.evaluation.generation import generate
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import Decoder

VOCABULARY, NEW = 29, 8
NEVER = (-1, -1)
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
MODEL = Decoder(CONFIG)
APPLY = MODEL.apply
PROMPTS = [[5], [3, 1, 4, 1, 5], [9, 2, 6]]
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside "
    "in the park. One day, she saw a big, red ball. She wanted to play with it, but it "
    "was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and "
    "didn't know what to do. She said, \"I want to play with your ball, but I can't "
    "find it.\"\nLily was sad and didn't know what to do. She said, \"I'm sorry, Lily. "
    "I didn't know what to do.\"\nLily didn't want to help her mom, so she"
)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.7, leaf.dtype),
        huggingface.abstract_params(CONFIG),
    )


@functools.cache
def reader():
    return jax.jit(lambda params, tokens: APPLY({"params": params}, tokens))


def reread(params, prompt, number):
    """Continue one prompt greedily without a cache, and without padding before it."""
    tokens = list(prompt)
    for _ in range(number):
        # Causal: what stands behind the last token does not show.
        padded = np.zeros((1, 16), int)
        padded[0, : len(tokens)] = tokens
        logits: Any = reader()(params, padded)
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def left_padded(prompts):
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


@pytest.fixture(scope="module")
def expected(params):
    return [reread(params, prompt, NEW) for prompt in PROMPTS]


def test_every_row_goes_on_as_if_alone_and_unpadded(params, expected):
    made = generate(
        APPLY, params, *left_padded(PROMPTS), max_new_tokens=NEW, eos_ids=NEVER
    )
    assert made.tokens.tolist() == expected
    assert made.lengths.tolist() == [NEW] * 3
    assert len({tuple(row) for row in expected}) == 3


def test_a_lone_token_is_prompt_enough(params, expected):
    made = generate(
        APPLY, params, *left_padded([PROMPTS[0]]), max_new_tokens=NEW, eos_ids=NEVER
    )
    assert made.tokens.tolist() == [expected[0]]


def test_rows_end_on_any_end_token_and_the_others_go_on(params, expected):
    ends = [expected[1][2], expected[2][4]]
    made = generate(
        APPLY, params, *left_padded(PROMPTS), max_new_tokens=NEW, eos_ids=ends
    )
    lengths = []
    for row, free in zip(made.tokens.tolist(), expected, strict=True):
        end = next((n for n, token in enumerate(free) if token in ends), NEW)
        lengths.append(end)
        assert row == free[: end + 1] + free[end : end + 1] * (NEW - end - 1)
    assert made.lengths.tolist() == lengths
    assert lengths[1] <= 2
    assert max(lengths) > min(lengths)


def test_it_stops_reading_when_all_rows_have_ended(params, expected):
    read = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: read.append(1))
        return APPLY(*args, **kwargs)

    ends = sorted({row[1] for row in expected})
    made = generate(
        counted, params, *left_padded(PROMPTS), max_new_tokens=NEW, eos_ids=ends
    )
    jax.effects_barrier()
    last = int(made.lengths.max())
    assert last < NEW - 2
    assert len(read) == 1 + last + 1  # the prompts, and each token but the last
    assert (made.tokens[:, last:] == made.tokens[:, last : last + 1]).all()


def test_one_program_serves_all_calls_of_a_shape(params):
    traces = []

    def traced(*args, **kwargs):
        traces.append(1)
        return APPLY(*args, **kwargs)

    tokens, mask = left_padded(PROMPTS)
    run = functools.partial(generate, traced, params, max_new_tokens=2)
    first = run(tokens, mask, eos_ids=[1])
    number = len(traces)
    second = run(tokens[::-1], mask[::-1], eos_ids=[2])
    assert len(traces) == number
    assert first.tokens.tolist() == second.tokens.tolist()[::-1]


def lookup(variables, tokens, *, mask=None, decode, mutable):
    """A model whose logits are a row of its table, and whose cache is a number."""
    assert decode
    assert mutable == ["cache"]
    logits = variables["params"]["table"][tokens]
    return logits, {"cache": {"used": jnp.zeros((), jnp.int32)}}


def test_the_cache_has_a_slot_for_every_token_that_is_read():
    made = []

    def sized(variables, tokens, **kwargs):
        if "cache" not in variables:
            made.append(tokens.shape)
        return lookup(variables, tokens, **kwargs)

    generate(
        sized,
        {"table": jnp.eye(10)},
        *left_padded(PROMPTS),
        max_new_tokens=NEW,
        eos_ids=NEVER,
    )
    assert made == [(3, 5 - 1 + NEW)]  # the last new token is not read


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_follows_the_tempered_distribution(temperature):
    table = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    rows = 20_000
    made = generate(
        lookup,
        {"table": jnp.asarray(table)},
        np.full((rows, 1), 3, np.int32),
        np.ones((rows, 1), bool),
        max_new_tokens=2,
        eos_ids=NEVER,
        temperature=temperature,
        key=jax.random.key(0),
    )
    chance = np.exp(table / temperature)
    chance /= chance.sum(-1, keepdims=True)
    both = np.zeros((5, 5))
    np.add.at(both, tuple(np.asarray(made.tokens).T), 1 / rows)
    # Five standard deviations of the most uncertain frequency.
    np.testing.assert_allclose(both, chance[3][:, None] * chance, atol=0.018)


def test_a_key_fixes_the_sample_and_another_changes_it(params):
    run = functools.partial(
        generate,
        APPLY,
        params,
        *left_padded(PROMPTS),
        max_new_tokens=NEW,
        eos_ids=NEVER,
        temperature=1.5,
    )
    first = run(key=jax.random.key(1)).tokens.tolist()
    assert run(key=jax.random.key(1)).tokens.tolist() == first
    assert run(key=jax.random.key(2)).tokens.tolist() != first


def test_nearly_no_temperature_is_greedy(params, expected):
    made = generate(
        APPLY,
        params,
        *left_padded(PROMPTS),
        max_new_tokens=NEW,
        eos_ids=NEVER,
        temperature=1e-4,
        key=jax.random.key(0),
    )
    assert made.tokens.tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.ones(3, int)}, "same shape"),
        ({"mask": np.ones((3, 4), bool)}, "same shape"),
        ({"tokens": np.ones((0, 4)), "mask": np.ones((0, 4))}, "empty"),
        ({"mask": np.tri(5, k=2, dtype=bool)[:3]}, "on the left"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0}, "needs a key"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(params, change, message):
    tokens, mask = left_padded(PROMPTS)
    arguments: dict[str, Any] = {
        "tokens": tokens,
        "mask": mask,
        "max_new_tokens": 2,
        "eos_ids": NEVER,
    }
    with pytest.raises(InputError, match=message):
        generate(APPLY, params, **arguments | change)


def test_a_real_model_tells_its_golden_story(shared):
    folder = shared / "models" / "stories260K"
    config = huggingface.read_config(folder)
    made = generate(
        Decoder(config).apply,
        huggingface.load_params(folder, config),
        np.ones((1, 1), np.int32),
        np.ones((1, 1), bool),
        max_new_tokens=200,
        eos_ids=(1, 2),
    )
    assert made.lengths.tolist() == [200]
    tokenizer = huggingface.load_tokenizer(folder)
    text = tokenizer.decode(np.asarray(made.tokens[0]))
    assert text == GOLDEN


def test_an_adapted_model_generates_as_the_merged_one(params, expected):
    rules = [tsd.Rule(pattern=r"layers/.*_proj/kernel", rank=2, alpha=4, directions=2)]
    tokens, mask = left_padded(PROMPTS)
    spec = tsd.make_spec(APPLY, {"params": params}, rules, tokens, method="dash")
    trainable, directions = tsd.init(jax.random.key(0), spec)
    learned = {
        path: each.replace(a=each.a + 0.1, b=each.b + 0.1)
        for path, each in trainable.adapters.items()
    }
    trainable = trainable.replace(adapters=learned)
    trainable, directions, _ = tsd.launch(params, trainable, spec)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    run = functools.partial(generate, tokens=tokens, mask=mask, eos_ids=NEVER)
    merged = run(APPLY, tsd.merge(params, trainable, directions), max_new_tokens=NEW)
    bound = tsd.bind(params, trainable, directions)
    made = run(tsd.adapted(APPLY), bound, max_new_tokens=NEW)
    assert made.tokens.tolist() == merged.tokens.tolist()
    assert made.tokens.tolist() != expected
