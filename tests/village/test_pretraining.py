from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.village import pretraining
from tsd_jax.models.config import DecoderConfig
from tsd_jax.models.decoder import Decoder


def test_pack_keeps_documents_whole():
    documents = [[1, 2], [3, 4, 5], [6], [7, 8, 9, 10, 11], [12]]
    rows = list(pretraining.pack(iter(documents), 4, pad=0))
    assert rows == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [7, 8, 9, 10, 11]]


def test_pack_refuses_a_document_longer_than_a_row():
    with pytest.raises(ValueError, match="6 tokens, more than a row of 5"):
        list(pretraining.pack([[1] * 6], 4, pad=0))


def test_batches_shift_by_one_and_leave_out_padding():
    rows = itertools.cycle([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0]])
    batch = next(pretraining.batches(rows, 2, pad=0))
    np.testing.assert_array_equal(batch["tokens"], [[1, 7, 8, 2], [1, 9, 2, 0]])
    np.testing.assert_array_equal(batch["targets"], [[7, 8, 2, 0], [9, 2, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig(16, 8, 16, 2, 2, 1, 4, tie_word_embeddings=True))


SCHEDULE = pretraining.Schedule(
    steps=30,
    batch_size=4,
    length=8,
    learning_rate=0.02,
    other_learning_rate=0.02,
    weight_decay=0.0,
    warmup=5,
)


def test_muon_takes_each_layer_of_each_projection():
    keys = jax.random.split(jax.random.key(0))
    grads = {
        "embed": {"embedding": jax.random.normal(keys[0], (16, 8))},
        "layers": {"up_proj": {"kernel": jax.random.normal(keys[1], (2, 8, 16))}},
    }
    params = jax.tree.map(jnp.zeros_like, grads)
    optimizer = pretraining.make_optimizer(SCHEDULE)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    _, state = update(grads, state, params)  # at a rate of 0
    updates, _ = update(grads, state, params)
    kernels = (tree["layers"]["up_proj"]["kernel"] for tree in (updates, grads))
    for layer, gradient in zip(*kernels, strict=True):
        spread = [np.linalg.svd(x, compute_uv=False) for x in (layer, gradient)]
        new, old = (values.max() / values.min() for values in spread)
        assert new < 2 < old
    adam = np.abs(updates["embed"]["embedding"])
    np.testing.assert_allclose(adam, adam.max(), rtol=1e-2)


def test_pretraining_learns(model):
    rows = itertools.cycle([[1, 3, 4, 5, 6, 7, 8, 9, 2], [1, 9, 8, 7, 6, 5, 4, 3, 2]])
    reports = []
    pretraining.pretrain(
        model,
        pretraining.batches(rows, SCHEDULE.batch_size, pad=0),
        SCHEDULE,
        jax.random.key(0),
        lambda step, loss, params: reports.append((step, loss, params)),
    )
    ((step, loss, params),) = reports
    assert step == SCHEDULE.steps
    assert loss < 0.8  # log 16 = 2.8 at the start, log 2 / 8 at best
    norms = params["layers"]["input_layernorm"]["scale"]
    assert np.abs(norms - 1).max() > 0.01  # Adam's part trains too
