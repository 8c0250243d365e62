"""Rules between keys, which need neither a model nor data."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default, demo
from tests.helpers.demo_runs import SMALL, assert_refused, changed, small_settings
from tsd_jax.app.config import settings_from
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.core.quantization import Quantization
from tsd_jax.training.auto_launch import AutoLaunchConfig

BAD = {
    "model__path": ("", r"model.path is empty; name a folder or a hub id"),
    "model__dtype": ("float16", r"model.dtype 'float16'"),
    "adapter__scaling": ("half", r"unknown scaling 'half'"),
    "method__name": ("best", r"unknown method 'best'"),
    "method__discovery": ("guess", r"unknown method.discovery 'guess'"),
    "method__ranking": ("best", r"unknown ranking 'best'"),
    "method__start": ("p", r"unknown start 'p'"),
    "data__path": ("", r"data.path is empty; name a data file"),
    "train__batch_size": (9, r"train.batch_size 9 must be a multiple"),
    "eval__top_k": (5, r"eval.top_k 5 needs temperature above 0"),
    "eval__top_p": (0.5, r"eval.top_p 0.5 needs temperature above 0"),
    "eval__stop": (("",), r"eval.stop has an empty string"),
}

BAD_TOGETHER = {
    "a gradient nobody ranks by": (
        {"method__name": "milora", "method__discovery": "gradient"},
        r"directions from a gradient: method 'milora' ranks by 'smallest'",
    ),
    "a gradient without a launch": (
        {"method__name": "lora", "method__discovery": "gradient"},
        r"method.discovery='gradient' has no meaning for method 'lora'",
    ),
    "a gradient as a start": (
        {"method__start": "sigma+p", "method__discovery": "gradient"},
        r"directions from a gradient: start='sigma\+p' needs the change",
    ),
    "two ways to decide": (
        {
            **{"method__auto_launch": True, "method__discovery": "gradient"},
            **{"auto_launch__launch_min": 1, "auto_launch__every": 1},
            "auto_launch__patience": 1,
        },
        r"method.auto_launch=True waits .* choose one of them",
    ),
    "nothing to settle": (
        {"method__name": "lora", "method__auto_launch": True},
        r"method.auto_launch=True waits .* method 'lora' has no launch",
    ),
    "nothing that settles": (
        {"method__name": "pissa", "method__auto_launch": True},
        r"method.auto_launch=True waits .* method 'pissa' ranks by 'largest'",
    ),
    "no room to settle": (
        {"method__auto_launch": True, "auto_launch__launch_min": 4},
        r"auto_launch.launch_min 4 is larger than auto_launch.launch_max 3",
    ),
    "a restart at a step not known": (
        {
            **{"method__auto_launch": True, "auto_launch__launch_min": 1},
            **{"auto_launch__every": 1, "auto_launch__patience": 1},
            "optimizer__restart": True,
        },
        r"optimizer.restart=True needs a launch whose step is known beforehand",
    ),
    "no change to rank by": (
        {"method__launch_step": 0},
        r"method.launch_step 0: method 'tsd' finds its directions in what training",
    ),
    "no change to start at": (
        {
            **{"method__name": "pissa", "method__start": "sigma+p"},
            "method__launch_step": 0,
        },
        r"method.launch_step 0: method 'pissa'",
    ),
    "an unknown quantization": (
        {"model__quantization": "fp3", "model__remat": True},
        r"unknown quantization 'fp3'; choose one of int8, nf4",
    ),
    "quantized and without remat": (
        {"model__quantization": "nf4", "model__quantization_tile": 32},
        r"model.quantization='nf4' without model.remat=True .*model.remat=True$",
    ),
    "a tile of nothing": (
        {"model__quantization_tile": 32},
        r"model.quantization_tile needs a model.quantization",
    ),
    "nothing restarts": (
        {"method__name": "lora", "optimizer__restart": True},
        r"optimizer.restart=True needs a launch .* method 'lora' has none",
    ),
    "an expression of nothing": (
        {"adapter__full_params": "("},
        r"rule '\(': not a regular expression",
    ),
    "start of nothing": (
        {"method__name": "dash", "method__start": "zero"},
        r"start='zero' has no meaning for method 'dash'",
    ),
    "evaluations of nothing": (
        {"data__eval_path": "", "data__held_out": 0.0, "eval__every": 5},
        r"eval.every 5 needs data to evaluate: give a data.eval_path, or hold out",
    ),
    "a kept spectrum and no place for it": (
        {"cache_spectra": True},
        r"cache_spectra needs a cache_dir, which is 'off'",
    ),
}


# {key: the most that is allowed}; the least is nowhere below -1.
MOST = {
    "seed": 2**32 - 1,
    "auto_launch.threshold": 1,
    "adapter.dropout": 0.999,
    "data.held_out": 0.999,
    "optimizer.b1": 0.999,
    "optimizer.b2": 0.9999,
}


def numeric(section, prefix=""):
    """Find {key: default} of all numbers, and of tuples of them, in a config."""
    found = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found |= numeric(value, f"{prefix}{name}.")
        elif (isinstance(value, int | float) and not isinstance(value, bool)) or (
            isinstance(value, tuple) and value
        ):
            found[prefix + name] = value
    return found


NUMERIC = numeric(default.get_config().to_dict())


def outside(key, default):
    """Draw values that no range of this key can hold."""
    numbers = st.one_of(st.integers(-(2**40), -2), st.just(True))
    if isinstance(default, float):
        odd = st.sampled_from([math.nan, math.inf, -math.inf, 1e39, -1e-3])
        numbers |= odd | st.floats(max_value=-1e-30, allow_nan=False)
    else:
        numbers |= st.sampled_from([0.5, math.inf, math.nan])
    if key in MOST:
        numbers |= st.integers(int(MOST[key]) + 1, 2**40)
    if isinstance(default, tuple):
        good = st.sampled_from(default)
        return st.tuples(good, numbers, good)
    return numbers


@pytest.mark.parametrize("key", NUMERIC)
def test_a_number_out_of_its_range_is_refused_by_key(key):
    base = changed(demo.get_config().to_dict(), SMALL)

    @settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @given(outside(key, NUMERIC[key]))
    def refused(value):
        with pytest.raises(InputError, match=rf"^{re.escape(key)} must be .*, not "):
            settings_from(changed(base, {key.replace(".", "__"): value}))

    refused()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train__steps", 0, "a whole number of at least 1, not 0"),
        ("eval__limit", -1, "a whole number of at least 0, not -1"),
        ("eval__every", -1, "a whole number of at least 0, not -1"),
        ("eval__batch_size", 0, "a whole number of at least 1, not 0"),
        ("eval__max_new_tokens", 0, "a whole number of at least 1, not 0"),
        ("adapter__alpha", math.inf, "a finite number above 0, not inf"),
        ("method__epsilon", 0.0, "a finite number above 0, not 0.0"),
        ("optimizer__eps", 1e-50, "a finite number above 0, not 1e-50"),
        (
            "optimizer__learning_rate",
            math.nan,
            "a finite number of at least 0, not nan",
        ),
        ("optimizer__b2", 1.0, "a number in [0, 1), not 1.0"),
        ("data__held_out", 1.0, "a number in [0, 1), not 1.0"),
        ("auto_launch__threshold", 0.0, "a number in (0, 1], not 0.0"),
        ("seed", 2**32, "a whole number in [0, 4294967296), not 4294967296"),
        ("mesh", (0, 1, 1), "a whole number of at least 1 or -1, not 0"),
    ],
)
def test_the_range_of_a_number_is_told(key, value, told):
    line = f"{key.replace('__', '.')} must be {told}"
    assert_refused(lambda settings: settings, {key: value}, f"^{re.escape(line)}$")


CASES = [*BAD_TOGETHER.values(), *(({k: v}, told) for k, (v, told) in BAD.items())]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[*BAD_TOGETHER, *BAD])
def test_bad_settings_get_one_line(changes, message):
    assert_refused(lambda settings: settings, changes, message)


def test_a_method_is_composed_of_its_keys():
    settings = small_settings(method__ranking="smallest", method__start="zero")
    want = get_method("tsd", ranking="smallest", start="zero")
    assert settings.method.method() == want
    assert small_settings(method__keep=True).method.method().keep


def test_the_step_of_the_launch_is_known_only_where_it_is_fixed():
    assert small_settings().method.fixed_launch_step == 2
    assert small_settings(method__name="lora").method.fixed_launch_step is None
    # Its ranking looks at no change, so it may launch before the first step.
    early = small_settings(method__ranking="smallest", method__launch_step=0)
    assert early.method.fixed_launch_step == 0
    settles = small_settings(
        method__auto_launch=True,
        auto_launch__launch_min=1,
        auto_launch__every=1,
        auto_launch__patience=1,
    )
    assert settles.method.fixed_launch_step is None
    assert settles.auto_launch_config() == AutoLaunchConfig(
        launch_min=1,
        launch_max=3,  # half of the run
        every=1,
        threshold=0.8,
        patience=1,
        matrices=16,
    )
    assert small_settings().auto_launch_config() is None


def test_batches_of_a_gradient_count_only_where_it_is_ranked():
    assert small_settings(method__discovery_batches=3).method.gradient_batches == 0
    by_gradient = small_settings(
        method__discovery="gradient", method__discovery_batches=3, method__launch_step=0
    )
    assert by_gradient.method.gradient_batches == 3


def test_the_base_is_quantized_as_asked():
    assert small_settings().model.base_quantization() is None
    quantized = small_settings(
        model__quantization="nf4", model__quantization_tile=32, model__remat=True
    )
    want = Quantization(format="nf4", tile=32)
    assert quantized.model.base_quantization() == want


def test_rules_are_those_of_the_adapter_section():
    adapter = small_settings(adapter__full_params="norm/scale").adapter
    rule = adapter.rule()
    assert (rule.pattern, rule.rank, rule.dropout) == (adapter.pattern, 4, 0.1)
    assert [rule.pattern for rule in adapter.full_rules()] == ["norm/scale"]
    assert small_settings().adapter.full_rules() == []
