from __future__ import annotations

import flax.core
import pytest

from tsd_jax.core import paths
from tsd_jax.core.errors import InputError

TREE = {"a": {"kernel": 1, "bias": 2}, "b": {"c": {"kernel": 3}}}
FLAT = {"a/kernel": 1, "a/bias": 2, "b/c/kernel": 3}


def test_flatten_and_back():
    assert paths.flatten(TREE) == FLAT
    assert paths.flatten(flax.core.freeze(TREE)) == FLAT
    assert paths.unflatten(FLAT) == TREE


def test_update_copies():
    new = paths.update(TREE, {"a/kernel": 7, "a/kernel_tsd": 8})
    assert new["a"] == {"kernel": 7, "kernel_tsd": 8, "bias": 2}
    assert TREE["a"] == {"kernel": 1, "bias": 2}


def test_select_keeps_the_order_asked_for():
    chosen = paths.select(TREE, ("b/c/kernel", "a/bias"))
    assert list(chosen.items()) == [("b/c/kernel", 3), ("a/bias", 2)]


def test_select_names_what_is_missing():
    with pytest.raises(InputError, match="no 'b/kernel'"):
        paths.select(TREE, ("a/kernel", "b/kernel"))


def test_patterns_are_regular_expressions():
    paths.check_pattern(r"layers/\d+/.*", where="rule")
    with pytest.raises(InputError, match=r"^rule 'x': not a regular expression"):
        paths.check_pattern("(kernel", where="rule 'x'")
