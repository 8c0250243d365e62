"""Before step 1 the model with adapters is compared to its merged form, once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.demo_runs import small_settings
from tsd_jax.app import first_check
from tsd_jax.app.build import adapted_spec
from tsd_jax.app.data import read_files
from tsd_jax.app.first_check import check_first
from tsd_jax.app.model import Base, open_model
from tsd_jax.core.errors import InputError
from tsd_jax.core.quantization import Quantization, quantize
from tsd_jax.huggingface import load_params

SETTINGS = small_settings(mesh=(1, 1, 1))
BATCH = {"tokens": np.arange(24, dtype=np.int32).reshape(1, 2, 12)}
PATH = "layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def base() -> Base:
    files = read_files(SETTINGS.data, SETTINGS.seed)
    return open_model(SETTINGS.model, files)


@pytest.fixture(scope="module")
def params(base: Base) -> Any:
    return load_params(base.folder, base.config)


@pytest.fixture(scope="module")
def spec(base: Base) -> Any:
    return adapted_spec(SETTINGS, base)


def test_what_has_passed_is_not_checked_again(
    base, params, spec, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(first_check, "check", lambda *args: calls.append(args))

    def told(**changes: Any) -> str:
        changed = dataclasses.replace(base, **changes)
        return check_first(changed, params, spec, BATCH, str(tmp_path))

    assert told() == "adapters checked against merged kernels: the same outputs"
    assert told() == "adapters checked against merged kernels by an earlier run"
    ((_, variables, checked, tokens),) = calls
    assert variables["params"] is params
    assert checked is spec
    np.testing.assert_array_equal(tokens, np.arange(8)[None])
    told(network=base.network.copy(dtype=jnp.bfloat16))
    check_first(base, params, spec, BATCH, "off")
    assert len(calls) == 3


def test_a_wrong_model_is_refused_and_not_noted(base, params, spec, tmp_path):
    """What it computes depends on how many arrays it is given."""

    def odd(variables, tokens):
        found = len(jax.tree.leaves(variables))
        return base.network.apply(variables, tokens) * found

    network = base.network.clone()
    object.__setattr__(network, "apply", odd)
    wrong = dataclasses.replace(base, network=network)
    with pytest.raises(InputError, match="add nothing the model differs"):
        check_first(wrong, params, spec, BATCH, str(tmp_path))
    assert not (tmp_path / "checked").exists()


def test_what_is_not_checked_is_told(base, params, spec, monkeypatch):
    def told(params: Any) -> str:
        return check_first(base, params, spec, BATCH, "off")

    start = "adapters not checked against merged kernels: "
    assert (
        told(quantize(params, Quantization(format="int8", tile=96), PATH))
        == f"{start}the base is quantized"
    )
    monkeypatch.setattr(first_check, "_BYTES", 1000)
    assert told(params) == f"{start}a merged copy of the kernels takes 0.0 GiB a device"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert told(params) == f"{start}several processes"


def test_the_demo_passes(base, params, spec):
    assert check_first(base, params, spec, BATCH, "off").endswith("the same outputs")
