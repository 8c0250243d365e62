from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.decoders import PUBLISHED
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families import gemma
from tsd_jax.huggingface.families.decoders import DECODERS
from tsd_jax.huggingface.families.fields import Fields
from tsd_jax.models.rope import LinearScaling


def fields(family: str, **changes) -> Fields:
    values = {**PUBLISHED[family], **changes}
    return Fields(Path("config.json"), values, DECODERS[family].defaults)


def test_every_second_layer_of_a_gemma2_has_a_window():
    values = gemma.read_gemma2(fields("gemma2"))
    assert values["window_layers"] == (True, False, True, False)
    assert (values["attn_logit_softcapping"], values["final_logit_softcapping"]) == (
        2.0,
        3.0,
    )


def test_each_period_of_a_gemma3_ends_without_a_window():
    values = gemma.read_gemma3(fields("gemma3_text"))
    assert values["window_layers"] == (True, True, False, True)
    assert (values["rope_theta"], values["rope_local_theta"]) == (1e6, 50.0)
    assert values["attn_logit_softcapping"] is None


def test_rotary_settings_by_type_of_layer():
    settings = {
        "full_attention": {"type": "linear", "factor": 8.0, "rope_theta": 7.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
    }
    values = gemma.read_gemma3(fields("gemma3_text", rope_parameters=settings))
    assert values["rope_scaling"] == LinearScaling(8.0)
    assert (values["rope_theta"], values["rope_local_theta"]) == (7.0, 3.0)
    settings["sliding_attention"] = {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(InputError, match="rope type of windows is 'linear'"):
        gemma.read_gemma3(fields("gemma3_text", rope_parameters=settings))


def test_attention_to_later_tokens_is_refused():
    with pytest.raises(InputError, match="use_bidirectional_attention"):
        gemma.read_gemma2(fields("gemma2", use_bidirectional_attention=True))
