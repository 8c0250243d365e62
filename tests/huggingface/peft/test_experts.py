"""What PEFT asks of the adapters of experts, held against its own layout."""

from __future__ import annotations

import numpy as np
import pytest

from tsd_jax.huggingface.factors import Factors
from tsd_jax.huggingface.peft import experts

LAYER = "model.layers.0.mlp"


def factors(seed, fan_in, fan_out, rank):
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(fan_in, rank)), rng.normal(size=(rank, fan_out)))


def test_zeros_stand_for_what_an_expert_lacks():
    given = {
        f"{LAYER}.experts.0.down_proj": factors(0, 5, 4, 2),
        f"{LAYER}.experts.1.up_proj": factors(1, 4, 5, 3),
        f"{LAYER}.gate": factors(2, 4, 2, 1),
        f"{LAYER}.shared_expert.up_proj": factors(3, 4, 7, 6),
    }
    found, rank = experts.complete(given)
    assert rank == 3
    names = [
        f"experts.{n}.{part}_proj" for n in "01" for part in ("gate", "up", "down")
    ]
    assert found.keys() == given.keys() | {f"{LAYER}.{name}" for name in names}
    for name, pair in found.items():
        product = pair.down @ pair.up
        if name in given:
            np.testing.assert_array_equal(product, given[name].down @ given[name].up)
        else:
            assert product.shape == ((5, 4) if "down" in name else (4, 5))
            assert not product.any()
        assert pair.rank == (6 if "shared" in name else 3)


def test_without_experts_nothing_changes():
    given = {"model.layers.0.self_attn.q_proj": factors(0, 4, 4, 2)}
    assert experts.complete(given) == (given, 0)
    assert experts.targets(given, {"q_proj"}) == {"target_modules": ["q_proj"]}
    assert experts.patterns(given, 2) == {}


def test_names_that_others_share_get_longer():
    parts = ("gate_proj", "up_proj", "down_proj")
    modules = {f"{LAYER}.experts.{n}.{part}" for n in range(2) for part in parts}
    modules |= {f"{LAYER}.shared_expert.up_proj", f"{LAYER}.gate"}
    modules |= {"model.layers.0.self_attn.q_proj"}
    found = experts.targets(modules, {"q_proj", "gate", *parts})
    longer = {f"experts.{n}.{part}" for n in range(2) for part in parts}
    wanted = {"q_proj", "shared_expert.up_proj"} | longer
    assert found["target_modules"] == sorted(wanted)
    parameters = ["experts.down_proj", "experts.gate_up_proj", "gate.weight"]
    assert found["target_parameters"] == parameters
    assert experts.patterns(modules, 3) == {r".*\.gate_up_proj": 6}


@pytest.mark.parametrize(
    ("module", "parameters", "found"),
    [
        ("experts", ["gate_up_proj", "down_proj"], "experts.down_proj"),
        ("experts.base_layer", ["gate_up_proj", "down_proj"], "experts.gate_up_proj"),
        ("experts", ["mlp.experts.gate_up_proj"], "experts.gate_up_proj"),
        ("gate", ["mlp.gate.weight"], None),
        ("experts.0.up_proj", ["gate_up_proj"], None),
    ],
)
def test_which_parameter_is_wrapped_where(module, parameters, found):
    wanted = None if found is None else f"{LAYER}.{found}"
    assert experts.stacked_parameter(f"{LAYER}.{module}", parameters) == wanted


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_stacked_factors_are_taken_apart(kind):
    number, rank, fan_in, fan_out = 3, 2, 4, 6
    rng = np.random.default_rng(0)
    a = rng.normal(size=(number * rank, fan_in))
    b = rng.normal(size=(fan_out, rank * number))
    # As PEFT's own `ParamWrapper.get_delta_weight` has it.
    stacked = np.einsum(
        "ore,eri->eoi",
        b.reshape(fan_out, rank, number),
        a.reshape(number, rank, fan_in),
    )
    found = experts.split(f"{LAYER}.experts.{kind}", a, b, rank)
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    assert len(found) == number * len(parts)
    for expert in range(number):
        pairs = [found[f"{LAYER}.experts.{expert}.{part}"] for part in parts]
        delta = np.concatenate([(down @ up).T for down, up in pairs])
        np.testing.assert_allclose(delta, stacked[expert], atol=1e-12)
