"""Rules between keys, which need neither a model nor data."""

from __future__ import annotations

import pytest

from tests.helpers.demo_runs import assert_refused, small_settings
from tsd_jax.core.methods import get_method
from tsd_jax.core.quantization import Quantization
from tsd_jax.training.auto_launch import AutoLaunchConfig

BAD = {
    "model__path": ("", r"model.path is empty; name a folder or a hub id"),
    "model__dtype": ("float16", r"model.dtype 'float16'"),
    "adapter__dropout": (1.5, r"dropout must be in"),
    "adapter__rank": (0, r"rank must be at least 1"),
    "adapter__scaling": ("half", r"unknown scaling 'half'"),
    "method__name": ("best", r"unknown method 'best'"),
    "method__discovery": ("guess", r"unknown method.discovery 'guess'"),
    "method__ranking": ("best", r"unknown ranking 'best'"),
    "method__start": ("p", r"unknown start 'p'"),
    "data__path": ("", r"data.path is empty; name a data file"),
    "train__steps": (0, r"train.steps must be at least 1, not 0"),
    "train__log_every": (0, r"train.log_every must be at least 1, not 0"),
    "train__checkpoint_every": (-1, r"train.checkpoint_every must be at least 0"),
    "train__batch_size": (9, r"train.batch_size 9 must be a multiple"),
    "train__micro_batches": (0, r"must be a multiple of train.micro_batches 0"),
    "eval__batch_size": (0, r"eval.batch_size must be at least 1, not 0"),
    "eval__limit": (-8, r"eval.limit must be at least 0, not -8"),
    "eval__max_new_tokens": (0, r"eval.max_new_tokens must be at least 1"),
    "optimizer__learning_rate": (-1e-3, r"optimizer.learning_rate must be at least 0"),
    "optimizer__weight_decay": (float("nan"), r"weight_decay must be at least 0"),
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
    "a gradient of no batch": (
        {"method__discovery": "gradient", "method__discovery_batches": 0},
        r"method.discovery_batches must be at least 1, not 0",
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
    "a threshold no overlap reaches": (
        {"method__auto_launch": True, "auto_launch__threshold": 1.5},
        r"auto_launch.threshold must lie in \(0, 1\], not 1.5",
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
    "a kept spectrum and no place for it": (
        {"cache_spectra": True},
        r"cache_spectra needs a cache_dir, which is 'off'",
    ),
    "a place of no size": (
        {"cache_spectra": True, "cache_dir": "here", "cache_spectra_gb": 0.0},
        r"cache_spectra_gb must be positive, not 0.0",
    ),
    "all of the data held out": (
        {"data__eval_path": "", "data__held_out": 1.0},
        r"data.held_out must be in \[0, 1\), not 1.0",
    ),
}


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
