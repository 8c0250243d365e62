from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_llama import CONFIG
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families import common
from tsd_jax.huggingface.families.fields import Fields

FULL, NEAR = "full_attention", "sliding_attention"


def fields(**values: Any) -> Fields:
    return Fields(Path("config.json"), {"num_hidden_layers": 3, **values}, {})


def test_the_common_values_are_read_as_they_are_written():
    read = common.read_common(Fields(Path("x"), common.write_common(CONFIG), {}))
    assert read == {name: getattr(CONFIG, name) for name in read}


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({"layer_types": [FULL] * 3}, {}),
        ({"layer_types": [NEAR] * 3}, {"sliding_window": 5, "window_layers": ()}),
        (
            {"layer_types": [NEAR, FULL, FULL]},
            {"sliding_window": 5, "window_layers": (True, False, False)},
        ),
        ({}, {"sliding_window": 5, "window_layers": (False, True, True)}),
    ],
)
def test_windows(values, want):
    found = common.read_windows(
        fields(sliding_window=5, **values), lambda layer: layer > 0
    )
    assert found == want


def test_windows_that_are_turned_off():
    def read(**values):
        return common.read_chosen_windows(fields(**values), lambda _: True)

    assert read(sliding_window=5) == {}
    assert read(use_sliding_window=True) == {}
    assert read(use_sliding_window=True, sliding_window=5)["sliding_window"] == 5


def test_what_is_refused():
    with pytest.raises(InputError, match="layer type is 'x'"):
        common.read_windows(fields(layer_types=["x"] * 3), lambda _: True)
    with pytest.raises(InputError, match="length of layer_types is 2"):
        common.read_windows(fields(layer_types=[FULL] * 2), lambda _: True)
    with pytest.raises(InputError, match=r"partial_rotary_factor is 0\.5"):
        common.check_whole_heads(fields(), {"partial_rotary_factor": 0.5})
    with pytest.raises(InputError, match="every is 0"):
        common.read_period(fields(every=0), "every")
