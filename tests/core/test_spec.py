from __future__ import annotations

import functools
import math

import jax
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule, build_spec, kernel_spec, match_rules

PATHS = (
    "embed/embedding",
    "layers/attn/q/kernel",
    "layers/attn/q/bias",
    "layers/attn/v/kernel",
    "layers/mlp/up/kernel",
    "head/kernel",
)
STACKED = Layout((0,), (1,), (2,), lifted=(0,))


def test_the_first_rule_that_matches_wins():
    first = Rule(pattern=r"layers/attn/q/kernel", rank=2)
    second = Rule(pattern=r"layers/.*/kernel", rank=4)
    matched = match_rules(PATHS, [first, second])
    assert matched == {
        "layers/attn/q/kernel": first,
        "layers/attn/v/kernel": second,
        "layers/mlp/up/kernel": second,
    }


def test_matches_are_in_full_and_in_the_order_of_the_tree():
    rules = [Rule(pattern="head/kernel"), Rule(pattern=r".*/(q|v)/kernel")]
    assert list(match_rules(PATHS, rules)) == [
        "layers/attn/q/kernel",
        "layers/attn/v/kernel",
        "head/kernel",
    ]
    with pytest.raises(InputError, match="matches no parameter"):
        match_rules(PATHS, [Rule(pattern="attn/q/kernel")])  # a part is no match


def test_a_rule_that_matches_nothing_names_the_nearest_path():
    with pytest.raises(InputError, match=r"'head/kernels'.*nearest.*head/kernel"):
        match_rules(PATHS, [Rule(pattern=".*/q/kernel"), Rule(pattern="head/kernels")])


def test_a_shadowed_rule_is_refused():
    rules = [Rule(pattern=".*/kernel"), Rule(pattern="head/kernel")]
    with pytest.raises(InputError, match="'head/kernel' matches only what earlier"):
        match_rules(PATHS, rules)


def test_no_rules_are_refused():
    with pytest.raises(InputError, match="no rules"):
        match_rules(PATHS, [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "(kernel"}, "not a regular expression"),
        (
            {"rank": 0},
            "rule .kernel.: rank must be a whole number of at least 1, not 0",
        ),
        (
            {"directions": 0},
            "directions must be .* at least 1, not 0; .*'lora' or 'init'",
        ),
        ({"alpha": 0.0}, "alpha must be a finite number above 0, not 0.0"),
        ({"alpha": -1.0}, "alpha must be a finite number above 0, not -1.0"),
        ({"alpha": math.nan}, "alpha must be a finite number above 0, not nan"),
        ({"alpha": math.inf}, "alpha must be a finite number above 0, not inf"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\)"),
        ({"scaling": "dora"}, "unknown scaling 'dora'; choose one of lora, rslora"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Rule(**{"pattern": "kernel", **values})


@pytest.mark.parametrize(("scaling", "gamma"), [("lora", 4.0), ("rslora", 8.0)])
def test_scale(scaling, gamma):
    rule = Rule(pattern="k", rank=4, alpha=16, scaling=scaling, directions=2)
    spec = kernel_spec("k", (8, 8), Layout(), rule, get_method("dash"))
    assert spec.scale == gamma


@pytest.mark.parametrize(
    ("name", "keep", "gains", "ranked", "columns"),
    [
        ("lora", False, 0, 0, 0),
        ("dash", False, 3, 3, 3),
        ("init", False, 0, 4, 4),
        ("tsd", False, 3, 4, 4),
        ("tsd", True, 3, 4, 8),
    ],
)
def test_sizes_beside_a_stacked_kernel(name, keep, gains, ranked, columns):
    rule = Rule(pattern="k", rank=4, alpha=8, directions=3, dropout=0.1)
    method = get_method(name, keep=keep)
    spec = kernel_spec("k", (2, 5, 9), STACKED, rule, method)
    assert (spec.gains, spec.ranked, spec.columns) == (gains, ranked, columns)
    assert (spec.batch_shape, spec.fan_in, spec.fan_out) == ((2,), 5, 9)
    assert (spec.rank, spec.alpha, spec.scale, spec.dropout) == (4, 8, 2.0, 0.1)
    assert spec.trainable == 2 * (4 * 5 + 4 * 9 + gains)


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 9, 3)])
@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("lora", {"rank": 4}, "rank 4 is larger than the kernel.*at most 3"),
        ("tsd", {"rank": 4}, "rank 4 is larger than the kernel.*at most 3"),
        ("dash", {"rank": 2, "directions": 4}, "directions 4 is larger.*at most 3"),
    ],
)
def test_more_than_the_kernel_has_is_refused(shape, method, values, message):
    rule = Rule(pattern="k", **{"directions": 1, **values})
    with pytest.raises(InputError, match=message):
        kernel_spec("k", shape, STACKED, rule, get_method(method))


def test_directions_do_not_matter_without_gains():
    rule = Rule(pattern="k", rank=2, directions=100)
    spec = kernel_spec("k", (2, 3, 9), STACKED, rule, get_method("init"))
    assert spec.gains == 0


def test_build_spec_puts_kernels_together():
    heads = Layout((0, 1), (2,), (3,))
    matched = {
        "x": Rule(pattern="x", rank=2, directions=2),
        "y": Rule(pattern="y", rank=1, directions=1),
    }
    shapes, layouts = {"y": (2, 5, 9), "x": (2, 3, 5, 9)}, {"x": heads, "y": STACKED}
    spec = build_spec(shapes, layouts, matched, get_method("tsd"))
    assert spec.paths == ("x", "y")
    assert [kernel.layout for kernel in spec.kernels] == [heads, STACKED]
    assert spec.trainable == 6 * (2 * (5 + 9) + 2) + 2 * (1 * (5 + 9) + 1)


def test_a_layout_that_does_not_fit_is_refused():
    rule = Rule(pattern="x", rank=1, directions=1)
    with pytest.raises(InputError, match="x: Layout"):
        build_spec({"x": (2, 3, 4)}, {"x": Layout()}, {"x": rule}, get_method("tsd"))


def test_a_spec_is_static_under_jit():
    def build():
        rule = Rule(pattern="x", rank=2, directions=2)
        return build_spec(
            {"x": (2, 5, 9)}, {"x": STACKED}, {"x": rule}, get_method("tsd")
        )

    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def double(x, spec):
        traces.append(spec)
        return 2 * x

    assert double(1.0, build()) == double(1.0, build()) == 2
    assert len(traces) == 1
    assert hash(build()) == hash(build())


@pytest.mark.parametrize("method", ["lora", "init", "pissa"])
def test_directions_are_counted_only_where_they_train(method):
    rule = Rule(pattern="k", rank=2, directions=2, auto_directions=True)
    with pytest.raises(InputError, match=f"auto_directions=True has no.*'{method}'"):
        kernel_spec("k", (8, 8), Layout(), rule, get_method(method))
    with pytest.raises(InputError, match="auto_directions=True has no meaning"):
        kernel_spec("k", (8, 8), Layout(), rule, get_method("dash", ranking="random"))
    assert kernel_spec("k", (8, 8), Layout(), rule, get_method("tsd")).gated


@pytest.mark.parametrize("rank", [4.0, True, "4"])
def test_a_rank_is_an_int(rank):
    rule = Rule(pattern="k")
    object.__setattr__(rule, "rank", rank)  # past the tests' own type checks
    with pytest.raises(
        InputError, match="rank must be a whole number of at least 1, not"
    ):
        rule.__post_init__()
