from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.helpers.small_llama import CONFIG
from tests.helpers.table_model import token_rows
from tests.helpers.trees import assert_leaves_close, filled
from tsd_jax.app.split_decoder import split_decoder
from tsd_jax.binding.linen import adapted, bind_variables, make_spec
from tsd_jax.core.full_params import Full
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule
from tsd_jax.evaluation.chunked_loss import chunked_next_token_loss, most_counted
from tsd_jax.evaluation.loss import next_token_loss
from tsd_jax.models.decoder import Decoder

BATCH = token_rows(CONFIG.vocab_size, 3, 8)
LAYERS = Rule(pattern=r"layers/.*q_proj/kernel", rank=2)
HEAD = Rule(pattern=r"lm_head/kernel", rank=2)
TABLE = r"embed_tokens/embedding"
# {what trains beside a projection: (whether the head is the embedding, rules)}.
CASES = {
    "nothing of the head": (False, []),
    "an adapter of the head": (False, [HEAD]),
    "an adapter with magnitudes": (False, [dataclasses.replace(HEAD, dora=True)]),
    "the head in full": (False, [Full(pattern=r"lm_head/kernel")]),
    "nothing of the table": (True, []),
    "the table in full": (True, [Full(pattern=TABLE)]),
    "rows of the table": (True, [Full(pattern=TABLE, rows=(3, 9), axis=0)]),
}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_the_decoder_does(case):
    """Loss and gradients are those of all logits, whatever of the head trains."""
    tied, rules = CASES[case]
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, tie_word_embeddings=tied)
    model = Decoder(dataclasses.replace(config, final_logit_softcapping=5.0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), BATCH["tokens"])["params"]
    params = filled(0, shapes, 0.5)
    spec = make_spec(
        model.apply,
        {"params": params},
        [LAYERS, *rules],
        BATCH["tokens"],
        method="lora",
    )
    start, directions = init(jax.random.key(1), spec, params=params)
    moved = filled(2, jax.eval_shape(lambda: start), 0.3)
    trainable = jax.tree.map(lambda a, b: a + b, start, moved)
    losses = (
        next_token_loss(adapted(model.apply)),
        chunked_next_token_loss(
            split_decoder(model),
            counted=most_counted(BATCH["weights"]),
            chunk_bytes=2 * 4 * CONFIG.vocab_size * len(BATCH["tokens"]),
        ),
    )

    @functools.partial(jax.jit, static_argnums=1)
    def differentiated(trainable, loss_fn):
        def loss(trainable):
            variables = bind_variables(params, trainable, directions, None)
            return loss_fn(variables, BATCH)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (expected, _), want = differentiated(trainable, losses[0])
    (found, _), gradient = differentiated(trainable, losses[1])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert_leaves_close(gradient, want, atol=1e-5)
