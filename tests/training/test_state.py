from __future__ import annotations

import jax
import numpy as np

from tests.helpers.trees import small_spec
from tsd_jax.core.adapter import init
from tsd_jax.training.optimizer import make_optimizer
from tsd_jax.training.state import create_state


def test_a_new_state():
    spec, key = small_spec("tsd"), jax.random.key(3)
    state = create_state(key, spec, make_optimizer(1e-3, 1e-2))
    assert (state.step.dtype, state.step.shape, int(state.step)) == (np.int32, (), 0)
    assert (state.launched.dtype, state.launched.shape) == (bool, ())
    assert not state.launched
    trainable, directions = init(key, spec)
    for ours, theirs in zip(
        jax.tree.leaves((state.trainable, state.directions)),
        jax.tree.leaves((trainable, directions)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_moments_are_kept_of_what_trains_alone():
    """Twice the adapters' elements, and a few counts; none of the frozen factors."""
    spec = small_spec("tsd")
    state = create_state(jax.random.key(0), spec, make_optimizer(1e-3, 1e-2))
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * spec.trainable
    assert all((np.asarray(leaf) == 0).all() for leaf in arrays)
