"""Flax models of transformers 4 take adapters as they are."""

from __future__ import annotations

import json

import pytest

from tests.helpers.aside import run_aside

# {model: its kernels, all adapted}.
KERNELS = {
    "FlaxGPT2LMHeadModel": 8,
    "FlaxBertForSequenceClassification": 14,
    "FlaxLlamaForCausalLM": 15,
    "FlaxGemmaForCausalLM": 14,
}


@pytest.fixture(scope="module")
def rows():
    printed = run_aside("transformers4", "tests.helpers.flax_models4")
    found = [json.loads(line) for line in printed.splitlines() if line[:1] == "{"]
    return {row["model"]: row for row in found}


@pytest.mark.parametrize(("name", "kernels"), KERNELS.items())
def test_a_model_is_adapted_launched_and_merged(rows, name, kernels):
    row = rows[name]
    assert row["kernels"] == kernels
    assert row["start"] == 0
    assert row["change"] > 1e-3
    assert row["bound"] < 1e-4
