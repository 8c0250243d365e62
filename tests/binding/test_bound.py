from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from tests.helpers.models import inputs, net
from tests.helpers.trees import random_all
from tsd_jax.binding.bound import Guarded, adapters_seen
from tsd_jax.binding.linen import adapted, bind
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError


def test_a_guarded_kernel_is_read_where_adapters_are_seen():
    guarded = Guarded(jnp.ones((2, 3)))
    assert guarded.shape == (2, 3)
    with pytest.raises(InputError, match=r"wrap its apply"):
        meta.unbox({"kernel": guarded})
    with adapters_seen({}):
        np.testing.assert_array_equal(guarded.unbox(), np.ones((2, 3)))


def test_a_guarded_box_loses_axes_as_the_box_does():
    box = nn.Partitioned(jnp.ones((2, 3)), names=("layers", None))
    params = {nn.PARTITION_NAME: "layers"}
    assert Guarded(box).remove_axis(0, params).value.names == (None,)


def test_adapters_of_unknown_calls_are_not_passed_over():
    """A file read without a spec tells nothing of a module's own contraction."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(1.0), (6, 6))

    model, params, spec = net("plain", "tsd", pattern="body/mix/kernel")
    trainable, directions = random_all(0, spec)
    (adapter,) = trainable.adapters.values()
    bare = adapter.replace(
        kernel=type(adapter.kernel)(**{**vars(adapter.kernel), "calls": ()})
    )
    unknown = Trainable(adapters={"body/mix/kernel": bare})
    x = inputs("plain")
    want = adapted(model.apply)({"params": bind(params, trainable, directions)}, x)
    got = adapted(model.apply)({"params": bind(params, unknown, directions)}, x)
    np.testing.assert_array_equal(got, want)  # Dense has a handler
    own = {"kernel": jnp.ones((6, 6))}
    alone = Trainable(adapters={"kernel": bare})
    pair = bind(own, alone, {"kernel": directions["body/mix/kernel"]})
    with pytest.raises(InputError, match=r"kernel: nothing tells how.*load_adapter"):
        adapted(Own().apply)({"params": pair}, x)
