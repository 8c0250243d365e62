from __future__ import annotations

import jax
import jax.numpy as jnp

from tsd_jax.app.plan import count_parameters, describe, table
from tsd_jax.core.full_params import FullSpec
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import get_method
from tsd_jax.core.quantization import Quantization, quantize
from tsd_jax.core.spec import Rule, build_spec
from tsd_jax.training.auto_launch import AutoLaunchConfig

STACKED = Layout((0,), (1,), (2,), (0,))


def params():
    kernel = jax.ShapeDtypeStruct((3, 6, 10), jnp.float32)
    return {"layers": {"up": {"kernel": kernel}}, "head": kernel}


def test_table_aligns_the_first_column_left_and_the_others_right():
    assert table([("a", "b"), ("long", "123")]) == "a       b\nlong  123"


def test_count_parameters_multiplies_shapes():
    assert count_parameters(params()) == 2 * 180


def test_describe_names_kernels_axes_ranks_and_counts():
    rule = Rule(pattern="x", rank=2, directions=4)
    path = "layers/up/kernel"
    spec = build_spec(
        {path: (3, 6, 10)}, {path: STACKED}, {path: rule}, get_method("tsd")
    )
    text = describe(spec, params(), 20, 150)
    trainable = 3 * (2 * (6 + 10) + 4)
    row = next(line for line in text.splitlines() if line.startswith(path)).split()
    assert row == [path, "3x6x10", "0", "|", "1", "|", "2", "2", "4", str(trainable)]
    assert "method tsd, launch after step 20, 150 steps" in text
    assert f"trainable {trainable} beside 360 frozen parameters (30.00 %)" in text


def test_describe_counts_magnitudes():
    path = "layers/up/kernel"
    rules = {path: Rule(pattern="x", rank=2, directions=4, dora=True)}
    spec = build_spec({path: (3, 6, 10)}, {path: STACKED}, rules, get_method("dash"))
    text = describe(spec, params(), 20, 150)
    assert "method dash on DoRA, launch after step 20" in text
    assert f"trainable {3 * (2 * (6 + 10) + 4 + 10)} beside 360" in text


def test_describe_tells_what_is_quantized():
    path = "layers/up/kernel"
    rules = {path: Rule(pattern="x", rank=2, directions=4)}
    spec = build_spec({path: (3, 6, 10)}, {path: STACKED}, rules, get_method("dash"))
    assert " of the base in " not in describe(spec, params(), 20, 150)
    base = quantize(params(), Quantization(format="int8", tile=3), path)
    text = describe(spec, base, 20, 150)
    size = 180 + 4 * 3 * 2 * 10
    bits = 8 * size / 180
    assert f"\n1 kernels of the base in int8: 0.000 GB, {bits:.2f} bits" in text
    assert "beside 360 frozen parameters" in text


def test_describe_tells_what_decides_when_to_launch():
    path = "layers/up/kernel"
    rule = Rule(pattern="x", rank=2, directions=4, auto_directions=True)
    rules = {path: rule}
    spec = build_spec({path: (3, 6, 10)}, {path: STACKED}, rules, get_method("dash"))
    settling = AutoLaunchConfig(launch_min=12, launch_max=34)
    text = describe(spec, params(), None, 150, settling)
    assert "launch once directions have settled, between step 12 and 34" in text
    assert "<= 4" in next(line for line in text.splitlines() if line.startswith(path))


def test_describe_names_full_params_and_counts_them_once():
    path = "layers/up/kernel"
    rules = {path: Rule(pattern="x", rank=2, directions=4)}
    full = (
        FullSpec(path="head", shape=(3, 6, 10)),
        FullSpec(path="table", shape=(9, 5), rows=(7, 9)),
    )
    spec = build_spec(
        {path: (3, 6, 10)}, {path: STACKED}, rules, get_method("lora"), full
    )
    table = jax.ShapeDtypeStruct((9, 5), jnp.float32)
    text = describe(spec, params() | {"table": table}, None, 150)
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    assert lines["head"] == ["head", "3x6x10", "full", "-", "-", "180"]
    rows = ["rows", "7", "to", "8", "of", "axis", "0"]
    assert lines["table"] == ["table", "9x5", *rows, "-", "-", "10"]
    trained = 3 * 2 * (6 + 10) + 180 + 10
    assert f"trainable {trained} beside {360 + 45 - 190} frozen" in text
