from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface.families.fields import Fields, checked, rope_settings
from tsd_jax.models.rope import LinearScaling, LongRope, YarnScaling


def fields(values: dict[str, Any] | None = None, **defaults: Any) -> Fields:
    return Fields(Path("config.json"), values or {}, defaults)


def test_a_field_comes_before_its_default():
    assert fields({"x": 3}, x=4).get("x", int) == 3
    assert fields({}, x=4).get("x", int) == 4
    assert fields({"x": None}, x=4).get("x", int, 5) == 4
    assert fields().get("x", int, 5) == 5
    # Null is a value of its own here.
    assert fields({"head_dim": None}, head_dim=4).get("head_dim", int, 5) == 5
    with pytest.raises(InputError, match="lacks 'x'"):
        fields().get("x", int)


@pytest.mark.parametrize(
    ("value", "kind", "want"),
    [
        (3, int, 3),
        (3, float, 3),
        (0.5, float, 0.5),
        (True, bool, True),
        ("x", str, "x"),
        ([1], list, [1]),
        ([1, 0.5], tuple[float, ...], (1, 0.5)),
    ],
)
def test_values_of_their_type(value, kind, want):
    assert checked("it", value, kind) == want


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (True, int, "it must be of type int, not True"),
        (True, float, "it must be of type float, not True"),
        (1, bool, "it must be of type bool, not 1"),
        (0.5, int, "it must be of type int, not 0.5"),
        ("1", float, "it must be of type float, not '1'"),
        (1, str, "it must be of type str, not 1"),
        ((1,), list, "it must be of type list"),
        (1.0, tuple[float, ...], r"of type tuple\[float, \.\.\.\], not 1.0"),
        (["1"], tuple[float, ...], "it must be of type float, not '1'"),
    ],
)
def test_values_of_another_type(value, kind, told):
    with pytest.raises(InputError, match=told):
        checked("it", value, kind)


SIZES = {"max_position_embeddings": 64, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(2)),
        ({"rope_type": "yarn", "factor": 2.0}, YarnScaling(2.0, 64)),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2]}
            | {"original_max_position_embeddings": 16},
            LongRope((1.0,), (2,), 4.0, 16),
        ),
        ({"rope_type": "default"}, None),
    ],
)
def test_scalings_are_built_by_the_types_of_their_fields(settings, want):
    given = fields({"rope_scaling": settings, **SIZES})
    scaling = given.scaling(given.rope())
    assert scaling == want
    entries = json.loads(json.dumps(rope_settings(scaling)))
    written = fields(entries | SIZES)
    assert written.scaling(written.rope()) == want


def test_a_scaling_lacks_or_mistypes_a_field():
    for settings, told in [
        ({"type": "linear"}, "rope type 'linear' lacks 'factor'"),
        ({"type": "linear", "factor": "2"}, "'factor' of rope type 'linear' must be"),
        ({"type": "x"}, "rope type is 'x'"),
        ("linear", "a table of settings"),
    ]:
        given = fields({"rope_scaling": settings, **SIZES})
        with pytest.raises(InputError, match=told):
            given.scaling(given.rope())


def test_types_may_have_other_names():
    given = fields({"rope_scaling": {"type": "su"}, **SIZES})
    assert given.rope(aliases={"su": "longrope"})["rope_type"] == "longrope"
    table = given.table({"near": {"type": "linear"}}, "near")
    assert table == {"type": "linear", "rope_type": "linear"}
    assert given.table({"near": None}, "near") == {}
