from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.small_llama import CONFIG, random_params
from tsd_jax.evaluation.cache import (
    Axes,
    cache_axes,
    choose_rows,
    empty_cache,
    repeat_rows,
)
from tsd_jax.models.decoder import Decoder

APPLY = Decoder(CONFIG).apply
VARIABLES = {"params": random_params()}


def test_a_cache_is_empty_and_has_room():
    cache = empty_cache(APPLY, VARIABLES, 3, 7)
    assert cache["layers"]["self_attn"]["key"].shape == (4, 3, 7, 2, 4)
    assert cache["mask"].shape == (3, 7)
    assert not any(leaf.any() for leaf in jax.tree.leaves(cache))


def test_axes_are_found_for_layers_stacked_and_apart():
    stacked = cache_axes(APPLY, VARIABLES)
    assert stacked == [Axes(None, None), Axes(1, 2), Axes(1, 2), Axes(0, 1)]
    apart = Decoder(CONFIG, scan_layers=False)
    params = jax.eval_shape(apart.init, jax.random.key(0), jnp.ones((1, 2), int))
    found = cache_axes(apart.apply, params)
    assert found == [Axes(None, None), *[Axes(0, 1)] * 8, Axes(0, 1)]


CACHE = {
    "index": jnp.asarray(5),
    "key": jnp.arange(2 * 4 * 3).reshape(2, 4, 3),
    "total": jnp.arange(4),
}
AXES = [Axes(None, None), Axes(1, 2), Axes(0, None)]


def test_rows_are_repeated_one_after_another():
    found = repeat_rows(CACHE, AXES, 2)
    assert found["index"] == 5
    assert found["total"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    np.testing.assert_array_equal(found["key"], np.repeat(CACHE["key"], 2, axis=1))


def test_rows_are_chosen_within_groups_from_a_slot_on():
    found = choose_rows(CACHE, AXES, jnp.asarray([[1, 1], [1, 0]]), first=1)
    rows = [1, 1, 3, 2]
    assert found["index"] == 5
    assert found["total"].tolist() == rows
    key = np.array(CACHE["key"])
    key[:, :, 1:] = key[:, rows, 1:]
    np.testing.assert_array_equal(found["key"], key)
