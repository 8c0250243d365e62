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
from tsd_jax.evaluation.generation import Generation, generate, padded_length
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import CACHE_RULES, DECODER_RULES, Decoder
from tsd_jax.training import sharding

VOCABULARY, NEW = 29, 8
FREE = Generation(max_new_tokens=NEW)
LETTERS = "abcdefghijklmnopqrstuvwxyz012"
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


@pytest.fixture(scope="module")
def expected(params):
    return [reread(params, prompt, NEW) for prompt in PROMPTS]


def spell(ids):
    """Decode: a letter for each token."""
    return "".join(LETTERS[each] for each in ids)


def made(params, prompts=PROMPTS, settings=FREE, **more):
    return generate(APPLY, {"params": params}, prompts, settings, **more)


def counted():
    """Return a model that counts how often it is traced, and how often it runs."""
    traces, runs = [], []

    def apply(*args, **kwargs):
        traces.append(1)
        jax.debug.callback(lambda: runs.append(1))
        return APPLY(*args, **kwargs)

    return apply, traces, runs


def test_every_row_goes_on_as_if_alone_and_unpadded(params, expected):
    assert made(params) == expected
    assert len({tuple(row) for row in expected}) == 3


def test_a_lone_token_is_prompt_enough(params, expected):
    assert made(params, PROMPTS[:1]) == expected[:1]


def test_no_prompts_have_no_texts(params):
    assert made(params, []) == []


@pytest.mark.parametrize("size", [1, 2, 5])
def test_texts_keep_the_order_of_their_prompts_in_batches(params, expected, size):
    prompts = [PROMPTS[n] for n in (1, 0, 2, 1)]
    found = made(params, prompts, batch_size=size)
    assert found == [expected[n] for n in (1, 0, 2, 1)]


def test_rows_end_on_any_end_token_and_the_others_go_on(params, expected):
    ends = (expected[1][2], expected[2][4])
    cut = []
    for free in expected:
        end = next((n for n, token in enumerate(free) if token in ends), NEW)
        cut.append(free[:end])
    assert made(params, settings=Generation(max_new_tokens=NEW, eos_ids=ends)) == cut
    assert len(cut[1]) <= 2
    assert len({*map(len, cut)}) > 1


def test_it_stops_reading_when_all_rows_have_ended(params, expected):
    apply, _, runs = counted()
    ends = tuple(sorted({row[1] for row in expected}))
    settings = Generation(max_new_tokens=NEW, eos_ids=ends)
    texts = generate(apply, {"params": params}, PROMPTS, settings)
    jax.effects_barrier()
    longest = max(map(len, texts))
    assert longest < NEW - 2
    assert len(runs) == 1 + longest + 1  # the prompts, and each token but the last


def test_one_program_serves_all_prompts_of_a_padded_length(params):
    apply, traces, _ = counted()
    run = functools.partial(generate, apply, {"params": params}, batch_size=2)
    run([[3, 4, 5], [6]], Generation(max_new_tokens=2, eos_ids=(1,)))
    number = len(traces)
    run([[7], [8] * 16, [9] * 5], Generation(max_new_tokens=2, eos_ids=(2,)))
    assert len(traces) == number
    run([[7] * 17], Generation(max_new_tokens=2, eos_ids=(2,)))
    assert len(traces) > number


def test_padded_lengths_are_few_and_waste_little():
    lengths = {n: padded_length(n) for n in range(1, 4097)}
    assert all(n <= to <= max(16, 1.25 * n + 15) for n, to in lengths.items())
    assert all(to % 16 == 0 for to in lengths.values())
    assert len({*lengths.values()}) == 8 + 4 * 5  # by 16 to 128, then four an octave
    assert (lengths[1], lengths[16], lengths[17], lengths[129]) == (16, 16, 32, 160)


def test_stop_strings_end_a_text_across_tokens(params):
    apply, _, runs = counted()
    long = Generation(max_new_tokens=40)
    free = [spell(ids) for ids in made(params, PROMPTS[:2], long)]
    stop = (free[0][9:12], free[1][4:6])  # three tokens, two tokens
    settings = Generation(max_new_tokens=40, stop=stop)
    texts = generate(apply, {"params": params}, PROMPTS[:2], settings, decode=spell)
    ends = [min(text.find(s) for s in stop if s in text) for text in free]
    assert texts == [text[:end] for text, end in zip(free, ends, strict=True)]
    jax.effects_barrier()
    assert max(ends) < len(runs) < 30  # not all 40
    never = Generation(max_new_tokens=11, stop=("?",))
    assert made(params, PROMPTS[:2], never, decode=spell) == [t[:11] for t in free]


def test_a_key_fixes_the_samples_and_another_changes_them(params):
    sampled = Generation(max_new_tokens=NEW, temperature=1.5)
    run = functools.partial(made, params, settings=sampled)
    first = run(key=jax.random.key(1))
    assert run(key=jax.random.key(1)) == first
    assert run(key=jax.random.key(2)) != first
    # What is drawn for a prompt depends on its number, not on its batch.
    assert run(key=jax.random.key(1), batch_size=2) == first
    twice = run([PROMPTS[0]] * 2, key=jax.random.key(1))
    assert twice[0] != twice[1]


@pytest.mark.parametrize("change", [{"temperature": 1e-4}, {"top_k": 1}])
def test_nearly_no_choice_is_greedy(params, expected, change):
    settings = Generation(**{"max_new_tokens": NEW, "temperature": 1.0} | change)
    assert made(params, settings=settings, key=jax.random.key(0)) == expected


def test_beams_of_every_prompt_go_on_as_if_alone(params, expected):
    settings = Generation(max_new_tokens=NEW, num_beams=3, eos_ids=(4,))
    alone = [made(params, [prompt], settings)[0] for prompt in PROMPTS]
    assert made(params, settings=settings, batch_size=3) == alone
    assert alone != [ids[: ids.index(4)] if 4 in ids else ids for ids in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0"),
        ({"stop": ("",)}, "empty string"),
        ({"top_k": 3}, "top_k 3 needs temperature above 0"),
        ({"top_p": 0.5}, "top_p 0.5 needs temperature above 0"),
        ({"length_penalty": 2.0}, "length_penalty 2.0 needs num_beams above 1"),
        ({"early_stopping": True}, "early_stopping True needs num_beams above 1"),
        ({"num_beams": 2, "temperature": 1.0}, "samples nothing"),
        ({"num_beams": 2, "stop": ("x",)}, "do not end a beam"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Generation(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"settings": Generation(temperature=1.0)}, "needs a key"),
        ({"settings": Generation(stop=("x",))}, "`decode` that gives text"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(params, change, message):
    with pytest.raises(InputError, match=message):
        made(params, **change)


def test_a_real_model_tells_its_golden_story(shared):
    folder = shared / "models" / "stories260K"
    config = huggingface.read_config(folder)
    [text] = generate(
        Decoder(config).apply,
        {"params": huggingface.load_params(folder, config)},
        [[1]],
        Generation(max_new_tokens=200, eos_ids=(1, 2)),
        decode=huggingface.load_tokenizer(folder).decode,
    )
    assert text == GOLDEN


def launched(base, **rule):
    """Return a bound adapter after launch, all of whose numbers have changed."""
    rules = [
        tsd.Rule(
            pattern=r"layers/.*_proj/kernel", rank=2, alpha=4, directions=2, **rule
        )
    ]
    tokens = np.ones((1, 4), np.int32)
    spec = tsd.make_spec(APPLY, {"params": base}, rules, tokens, method="dash")
    trainable, directions = tsd.init(jax.random.key(0), spec, params=base)
    learned = {
        path: each.replace(a=each.a + 0.1, b=each.b + 0.1)
        for path, each in trainable.adapters.items()
    }
    trainable = trainable.replace(adapters=learned)
    trainable, directions, _ = tsd.launch(base, trainable, spec)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    return trainable, directions


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_model_generates_as_the_merged_one(params, expected, dora, beams):
    trainable, directions = launched(params, dora=dora)
    settings = Generation(max_new_tokens=NEW, num_beams=beams)
    merged = made(tsd.merge(params, trainable, directions), settings=settings)
    bound = {"params": tsd.bind(params, trainable, directions)}
    assert generate(tsd.adapted(APPLY), bound, PROMPTS, settings) == merged
    assert merged != expected


def test_a_quantized_base_generates_with_adapters(params):
    small = tsd.Quantization(format="int8", tile=8)
    base = tsd.quantize(params, small, r"layers/.*_proj/kernel")
    trainable, directions = launched(base)
    bound = tsd.bind(base, trainable, directions)
    apply = tsd.adapted(APPLY)

    @jax.jit
    def forward(tokens):
        return apply({"params": bound}, tokens)

    tokens = np.zeros((1, 16), np.int32)
    tokens[0, :5] = PROMPTS[1]
    for end in range(5, 5 + NEW):
        tokens[0, end] = int(np.argmax(forward(tokens)[0, end - 1]))
    found = generate(apply, {"params": bound}, PROMPTS[1:2], FREE)
    assert found == [tokens[0, 5 : 5 + NEW].tolist()]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_a_mesh_changes_no_text(params, shape, beams):
    mesh = sharding.make_mesh(shape)
    shardings = sharding.param_shardings(params, DECODER_RULES, mesh)
    axes = jax.sharding.PartitionSpec(*sharding.BATCH[1:])
    placed = []

    def place_cache(cache):
        placed.append(cache["layers"]["self_attn"]["key"].shape)
        return sharding.constrain(cache, CACHE_RULES, mesh)

    prompts = [*PROMPTS, PROMPTS[1][:4]]
    settings = Generation(max_new_tokens=NEW, num_beams=beams, eos_ids=(4,))
    found = made(
        jax.device_put(params, shardings),
        prompts,
        settings,
        batch_size=4,
        place=lambda batch: sharding.place_batch(batch, mesh, axes),
        place_cache=place_cache,
    )
    assert found == made(params, prompts, settings)
    # Layers, rows, slots, heads, width of a head.
    assert placed[-1] == (2, 4 * beams, 15 + NEW, 2, 4)
