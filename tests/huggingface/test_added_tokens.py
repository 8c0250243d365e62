from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import (
    add_tokens,
    grow,
    grown_config,
    known_rows,
    load_tokenizer,
    read_config,
)

DEMO = Path(__file__).resolve().parents[2] / "tsd_jax/demo/assets/model"


def test_tokens_are_added_in_order_at_the_end():
    tokenizer = load_tokenizer(DEMO)
    size = len(tokenizer)
    assert add_tokens(tokenizer, ("<b>", "<a>")) == (size, size + 2)
    ids = tokenizer("<a>the<b>", add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (size + 1, size)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (("<a>", "<a>"), "already has token '<a>'"),
        (("the",), "already has token 'the'"),
        (("",), "added token '' is not text"),
        ((3,), "added token 3 is not text"),
    ],
)
def test_tokens_must_be_new_text(tokens, told):
    tokenizer = load_tokenizer(DEMO)
    tokens = tuple(min(tokenizer.get_vocab()) if t == "the" else t for t in tokens)
    told = told.replace("'the'", repr(tokens[0]).replace("\\", r"\\"))
    with pytest.raises(InputError, match=told):
        add_tokens(tokenizer, tokens)


def test_spare_rows_are_taken_first():
    config = read_config(DEMO)
    size = config.vocab_size
    assert grown_config(config, (size, size + 3)).vocab_size == size + 3
    assert grown_config(config, (size - 5, size - 2)).vocab_size == size
    with pytest.raises(InputError, match="do not belong to one model"):
        grown_config(config, (size + 1, size + 2))


@pytest.mark.parametrize("rows", [(6, 8), (4, 5)])
def test_new_rows_are_the_mean_of_the_old(rows):
    """Those past the stored ones, or spare ones among them."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 4)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    at = {
        "embed_tokens": {"embedding": NamedSharding(mesh, PartitionSpec(None, "fsdp"))},
        "lm_head": {"kernel": NamedSharding(mesh, PartitionSpec("fsdp"))},
        "norm": {"scale": NamedSharding(mesh, PartitionSpec())},
    }
    params = {
        "embed_tokens": {"embedding": jnp.asarray(table)},
        "lm_head": {"kernel": jnp.asarray(2 * table.T)},
        "norm": {"scale": jnp.ones(4)},
    }
    grown = grow(params, rows, at)
    start, stop = rows
    want = np.concatenate([table[:stop], np.zeros((max(stop - 6, 0), 4))])
    want = np.concatenate([want, table[stop:]])
    want[start:stop] = table[:start].astype(np.float64).mean(0)
    got = grown["embed_tokens"]["embedding"]
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got.sharding.is_equivalent_to(at["embed_tokens"]["embedding"], 2)
    np.testing.assert_allclose(grown["lm_head"]["kernel"], 2 * want.T, atol=1e-6)
    assert grown["norm"]["scale"] is params["norm"]["scale"]


def test_rows_of_known_tokens_are_one_run_of_ids():
    tokenizer = load_tokenizer(DEMO)
    names = tokenizer.convert_ids_to_tokens([7, 5, 6])
    assert known_rows(tokenizer, names) == (5, 8)
    with pytest.raises(InputError, match=r"have the ids \[5, 7\], and rows train only"):
        known_rows(tokenizer, names[:2])
    with pytest.raises(InputError, match="no token '<none>' to train"):
        known_rows(tokenizer, ["<none>"])
