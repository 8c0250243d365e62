"""A run that starts from an adapter of PEFT begins with stock PEFT's logits."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest
import transformers

from tests.helpers.demo_runs import ASSETS, small_settings
from tsd_jax.app.build import prepare
from tsd_jax.app.model import load_weights
from tsd_jax.app.run import start
from tsd_jax.binding.linen import bind_variables
from tsd_jax.training import sharding

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

MODEL = ASSETS / "model"
TOKENS = np.random.default_rng(0).integers(5, 200, size=(8, 12))


def peft_logits(folder, **config):
    """Write a random adapter with PEFT, and return the logits of its model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32
    )
    lora = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], **config
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                noise = 0.2 * torch.randn_like(value)
                exact = "lora_A" in name or "lora_B" in name
                value.copy_(noise if exact else value * (1 + noise))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def first_logits(folder, **changes):
    """Return the logits of a run's first state on eight devices."""
    settings = small_settings(
        adapter__start=str(folder),
        adapter__pattern="layers/self_attn/(q|v)_proj/kernel",
        adapter__alpha=16.0,
        **changes,
    )
    prepared = prepare(settings)
    base, mesh = prepared.base, prepared.mesh
    shardings = sharding.param_shardings(base.params, base.family.kind.rules, mesh)
    key = jax.random.key(0)
    params = load_weights(base, mesh, shardings, key)
    state, _ = start(prepared, key, params, shardings, None)
    assert not state.launched
    variables = bind_variables(params, state.trainable, state.directions)
    return np.asarray(jax.jit(base.apply)(variables, TOKENS))


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({}, {"method__name": "lora"}),
        ({"use_rslora": True}, {"adapter__scaling": "rslora"}),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, {"method__name": "dash"}),
        ({"alpha_pattern": {"v_proj": 3}}, {"method__keep": True}),
        ({"use_dora": True}, {"adapter__dora": True}),
        (
            {"modules_to_save": ["norm"]},
            {"adapter__full_params": ".*norm/scale", "method__name": "lora"},
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
            {"adapter__full_params": "embed_tokens/embedding"},
        ),
    ],
    ids=["lora", "rslora", "ranks", "alphas", "dora", "full", "rows"],
)
def test_the_first_step_sees_what_peft_computes(tmp_path, config, changes):
    expected = peft_logits(tmp_path, **config)
    found = first_logits(tmp_path, **changes)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
