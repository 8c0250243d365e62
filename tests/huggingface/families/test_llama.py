from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.decoders import PUBLISHED
from tsd_jax.huggingface.families import llama
from tsd_jax.huggingface.families.decoders import DECODERS
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.config import Experts


def fields(family: str, **changes) -> Fields:
    values = {**PUBLISHED[family], **changes}
    return Fields(Path("config.json"), values, DECODERS[family].defaults)


def test_biases_of_a_llama():
    values = llama.read_llama(fields("llama", attention_bias=True))
    assert (values["attention_bias"], values["mlp_bias"]) == (True, False)


def test_a_mistral_with_types_of_layers_is_a_ministral():
    assert "model_type" not in llama.read_mistral(fields("mistral"))
    types = ["sliding_attention", "full_attention"] * 2
    values = llama.read_mistral(fields("mistral", layer_types=types))
    assert values["model_type"] == "ministral"
    assert values["window_layers"] == (True, False, True, False)


def test_experts_of_a_mixtral():
    values = llama.read_mixtral(fields("mixtral"))
    assert values["experts"] == Experts(5, 2, 48)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_names_of_a_phis_scaling(name):
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    settings = {"type": name, **lists}
    scaling = llama.read_phi3(fields("phi3", rope_scaling=settings))["rope_scaling"]
    assert (scaling.short_factor, scaling.long_factor) == ((1.0,) * 4, (2.0,) * 4)


def test_layers_of_a_smollm_without_rotary_embedding():
    read = llama.read_smollm3
    assert read(fields("smollm3"))["rope_layers"] == (True, True, False, True)
    longer = fields("smollm3", no_rope_layers=[1, 1, 0, 1, 0, 0])
    assert read(longer)["rope_layers"] == (True, True, False, True)
    silent = fields("smollm3", no_rope_layers=None, no_rope_layer_interval=3)
    assert read(silent)["rope_layers"] == (True, True, False, True)
    assert read(fields("smollm3", no_rope_layers=[1] * 4))["rope_layers"] == ()
