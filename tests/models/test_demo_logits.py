"""The demo's model gives the logits that stock transformers gave, without torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tsd_jax import huggingface
from tsd_jax.models.decoder import Decoder

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tsd_jax" / "demo" / "assets" / "model"


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "goldens" / "demo_logits.npz") as file:
        return dict(file)


def test_goldens_belong_to_the_model(golden):
    content = (MODEL / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == golden["sha256"], (
        "the demo's model was made anew: run python tests/goldens/make_logits.py"
    )


@pytest.mark.parametrize("scan_layers", [True, False])
def test_logits_are_those_of_transformers(golden, scan_layers):
    config = huggingface.read_config(MODEL)
    params = huggingface.load_params(
        MODEL, config, dtype="float32", scan_layers=scan_layers
    )
    apply = jax.jit(Decoder(config, scan_layers=scan_layers).apply)
    mask = golden["mask"]
    logits = np.asarray(apply({"params": params}, golden["tokens"], mask=mask))
    np.testing.assert_allclose(logits[mask], golden["logits"][mask], atol=2e-4)
