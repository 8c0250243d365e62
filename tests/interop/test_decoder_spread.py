"""Every family is the one of transformers over a spread of configs, not one alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.compiled import QUICK
from tests.helpers.decoder_configs import configs
from tests.helpers.decoders import inputs
from tsd_jax import huggingface
from tsd_jax.huggingface.families.family import DECODER
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.models.decoder import Decoder

pytest.importorskip("torch")
from tests.helpers.stock import stock_model, torch_logits

TOLERANCE = 2e-4
# Less time to compile; the ordinary programs are held against goldens.
TOKENS, MASK, POSITIONS = inputs()
# Compiling is what takes time; a llama has most kinds of rotary embedding.
DECODERS = [name for name, each in FAMILIES.items() if each.kind is DECODER]
EXAMPLES = dict.fromkeys(DECODERS, 6) | {"llama": 14}


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_transformers(tmp_path_factory, family):
    @settings(
        max_examples=EXAMPLES[family],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(content=configs(family), padded=st.sampled_from([True, True, False]))
    def check(content, padded):
        model, saved = stock_model(content, tmp_path_factory.mktemp("model"))
        config = huggingface.read_config(saved)
        params = huggingface.load_params(saved, config)
        apply = jax.jit(Decoder(config).apply, compiler_options=QUICK)
        if padded:
            expected = torch_logits(model, TOKENS, MASK.astype(int), POSITIONS)
            found = np.asarray(apply({"params": params}, TOKENS, POSITIONS, MASK))
            expected, found = expected[MASK], found[MASK]
        else:
            expected = torch_logits(model, TOKENS)
            found = np.asarray(apply({"params": params}, TOKENS))
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)

    check()
