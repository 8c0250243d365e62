from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from tests.helpers.models import net
from tests.helpers.trees import random_all
from tsd_jax.binding.bound import Bound
from tsd_jax.binding.linen import bind
from tsd_jax.binding.linen.methods import TAG, Tag, bound_beside, candidates_of, read


def test_a_module_sees_what_lies_beside_its_own_parameters():
    _, params, spec = net("plain", "tsd", pattern="head/kernel")
    bound = bind(params, *random_all(0, spec))
    head = nn.Dense(3).bind({"params": bound["head"]})
    assert set(bound_beside(head)) == {"kernel"}
    assert isinstance(bound_beside(head)["kernel"], Bound)
    assert candidates_of(head) == {}
    assert bound_beside(nn.Dense(3).bind({"params": {"inner": bound["head"]}})) == {}
    assert bound_beside(nn.Dense(3)) == {}


def test_candidates_are_known_by_their_tags():
    held = {"kernel": jnp.ones((2, 3)), "kernel" + TAG: Tag(5, 0)}
    module = nn.Dense(3).bind({"params": held})
    assert candidates_of(module) == {"kernel": 5}
    assert read(module, "kernel").shape == (2, 3)
