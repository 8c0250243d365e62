from __future__ import annotations

import dataclasses

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.models.config import DecoderConfig, Experts, check_positive
from tsd_jax.models.rope import DynamicScaling

CONFIG = DecoderConfig(37, 16, 24, 2, 4, 2, 6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"partial_rotary_factor": 2.0}, r"head_dim \(6\) has 12 rotated channels"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish', and only silu"),
        ({"window_layers": (True,)}, "window_layers has 1 entries.* 2 layers"),
        (
            {"head_dim": 2, "rope_scaling": DynamicScaling(2.0, 8)},
            "rotated width over 2",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(CONFIG, **change)


def test_experts_are_checked():
    with pytest.raises(InputError, match=r"num_experts_per_tok \(3\) must not exceed"):
        Experts(2, 3, 8)
    with pytest.raises(InputError, match="intermediate_size must be positive, not 0"):
        Experts(2, 1, 0)


def test_only_named_fields_may_be_zero():
    @dataclasses.dataclass
    class Sizes:
        first: int
        second: float | None = None
        flag: bool = False

    check_positive(Sizes(1))
    check_positive(Sizes(0), zero=("first",))
    for bad in (Sizes(0), Sizes(-1), Sizes(1, float("inf")), Sizes(1, 0.0)):
        with pytest.raises(InputError, match=r"(first|second) must be positive"):
            check_positive(bad, zero=())


@pytest.mark.parametrize(
    ("window", "layers", "expected"),
    [
        (None, (), (False, False)),
        (4, (), (True, True)),
        (4, (False, True), (False, True)),
    ],
)
def test_which_layers_are_windowed(window, layers, expected):
    config = dataclasses.replace(CONFIG, sliding_window=window, window_layers=layers)
    assert config.windowed == expected


def test_the_rotated_width_is_a_part_of_the_head():
    assert CONFIG.rotary_width == 6
    half = dataclasses.replace(CONFIG, head_dim=8, partial_rotary_factor=0.5)
    assert half.rotary_width == 4
