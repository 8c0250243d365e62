from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.peft.files import AdapterFiles
from tsd_jax.huggingface.peft.modules import modules_of

PREFIX = "base_model.model."
CONFIG = {"r": 2, "lora_alpha": 6}
RNG = np.random.default_rng(0)


def pair(name: str, rank: int = 2, size: tuple[int, int] = (3, 5)):
    return {
        f"{PREFIX}{name}.lora_A.weight": RNG.normal(size=(rank, size[0])),
        f"{PREFIX}{name}.lora_B.weight": RNG.normal(size=(size[1], rank)),
    }


def read(tensors: dict[str, np.ndarray], **config: Any):
    return modules_of(AdapterFiles(Path("adapter"), CONFIG | config, tensors))


def test_factors_are_pefts_transposed_with_its_scale():
    tensors = pair("a.q")
    module = read(tensors)["a.q"]
    low, high = tensors.values()
    assert (module.rank, module.alpha, module.scale) == (2, 6.0, 3.0)
    np.testing.assert_allclose(module.a, low.T, rtol=1e-6)
    np.testing.assert_allclose(module.b, high.T, rtol=1e-6)
    product = module.factors.down @ module.factors.up
    np.testing.assert_allclose(product, 3 * (high @ low).T, rtol=1e-4, atol=1e-5)
    assert read(tensors, use_rslora=True)["a.q"].scale == pytest.approx(6 / 2**0.5)


def test_patterns_match_the_end_of_a_name():
    tensors = pair("a.q", 4) | pair("b.q") | pair("bq")
    found = read(tensors, rank_pattern={"a.q": 4}, alpha_pattern={"q": 8})
    assert {n: (m.rank, m.alpha) for n, m in found.items()} == {
        "a.q": (4, 8.0),
        "b.q": (2, 8.0),
        "bq": (2, 6.0),
    }


def test_magnitudes_are_those_of_the_config():
    tensors = pair("q") | {f"{PREFIX}q.lora_magnitude_vector": np.arange(5.0)}
    np.testing.assert_array_equal(read(tensors, use_dora=True)["q"].magnitude, range(5))
    with pytest.raises(InputError, match="asks for none"):
        read(tensors)


def test_experts_are_taken_apart():
    tensors = pair("mlp.experts", rank=3 * 2, size=(3, 5))
    parameters = {"target_parameters": ["experts.down_proj"]}
    found = read(tensors, **parameters)
    assert found.keys() == {f"mlp.experts.{n}.down_proj" for n in range(3)}
    low, high = tensors.values()
    # PEFT: the rank innermost in lora_A, the expert innermost in lora_B.
    second = found["mlp.experts.1.down_proj"]
    np.testing.assert_allclose(second.a, low[2:4].T, rtol=1e-6)
    np.testing.assert_allclose(second.b, high[:, [1, 4]].T, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({}, {}, "holds no LoRA tensors"),
        ({"x": np.zeros(3)}, {}, "holds tensor 'x'"),
        (dict([*pair("q").items()][:1]), {}, "lacks one factor of q"),
        (pair("q"), {"r": 3}, "gives it rank 3"),
        (pair("q"), {"lora_alpha": 0}, "which must be above 0"),
        (pair("q"), {"target_modules": ["k"]}, "not among target_modules"),
        (pair("q"), {"target_modules": "("}, "is not a regular expression"),
        ({n: x[None] for n, x in pair("q").items()}, {}, "are not matrices"),
    ],
)
def test_what_is_not_lora_of_linear_modules_is_refused(tensors, config, told):
    with pytest.raises(InputError, match=told):
        read(tensors, **config)
