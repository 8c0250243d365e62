from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.trees import STACKED, random_all, small_spec
from tsd_jax.core.adapter import delta, merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule, build_spec, match_rules
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft

LAYERS, IN, OUT = 3, 6, 7
SHAPES: dict[str, tuple[int, ...]] = {"k": (IN, OUT), "stack": (LAYERS, IN, OUT)}
LAYOUTS = {"k": Layout(), "stack": STACKED}
PLACES = {f"model.{n}.stack": ("stack", n) for n in range(LAYERS)} | {
    "head.k": ("k", None)
}
ALL = dict.fromkeys(PLACES, 4)
KEY = jax.random.key(0)


def write(
    folder,
    ranks: dict[str, int],
    *,
    dtype: Any = np.float32,
    magnitudes: int = 0,
    **config,
):
    """Write an adapter as PEFT would, and give {module: (lora_A, lora_B)}."""
    rng = np.random.default_rng(0)
    factors = {
        name: (
            rng.normal(size=(rank, IN)).astype(dtype),
            rng.normal(size=(OUT, rank)).astype(dtype),
        )
        for name, rank in ranks.items()
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    for name in ranks if magnitudes else ():
        key = f"base_model.model.{name}.lora_magnitude_vector"
        tensors[key] = rng.uniform(1, 2, size=magnitudes).astype(dtype)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    known = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["stack", "k"],
        "bias": "none",
        "base_model_name_or_path": "org/base",
        "lora_dropout": 0.25,
    }
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return factors


def spec_of(rules: Any, method="tsd"):
    return build_spec(
        SHAPES, LAYOUTS, match_rules(tuple(SHAPES), rules), get_method(method)
    )


def changes(trainable, directions) -> dict[str, np.ndarray]:
    """What is added to each torch module's weight, transposed."""
    dense = {
        p: np.asarray(delta(trainable.adapters[p], directions[p]))
        for p in trainable.adapters
    }
    return {
        name: dense[path] if layer is None else dense[path][layer]
        for name, (path, layer) in PLACES.items()
        if path in dense
    }


def expected(factors, name, scale):
    low, high = (factor.astype(np.float64) for factor in factors[name])
    return scale * (high @ low).T


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", ["lora", "dash", "init", "tsd"])
def test_an_adapter_starts_any_method_with_its_function(tmp_path, method, dtype):
    factors = write(tmp_path, ALL, dtype=dtype)
    found = from_peft(tmp_path, PLACES)
    assert (found.base_model, found.notes) == ("org/base", ())
    spec = spec_of(found.rules(directions=3), method)
    assert {k.dropout for k in spec.kernels} == {0.25}
    assert {k.gains for k in spec.kernels} <= {0, 3}
    trainable, directions = found.start(KEY, spec)
    assert not any(np.any(x) for x in jax.tree.leaves(directions))
    made = changes(trainable, directions)
    assert made.keys() == factors.keys()
    for name, change in made.items():
        np.testing.assert_allclose(change, expected(factors, name, 6 / 4), atol=1e-5)
    low, high = factors["model.1.stack"]
    np.testing.assert_array_equal(trainable.adapters["stack"].a[1], low.T)
    np.testing.assert_array_equal(trainable.adapters["stack"].b[1], high.T)


def test_magnitudes_are_read_and_made_where_there_are_none(tmp_path):
    """A layer without adapter starts at the norms of the base."""
    ranks = {name: 4 for name in PLACES if name != "model.2.stack"}
    factors = write(tmp_path, ranks, magnitudes=OUT, use_dora=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    found = from_peft(tmp_path, PLACES)
    spec = spec_of(found.rules(directions=2), "dash")
    assert all(kernel.dora for kernel in spec.kernels)
    rng = np.random.default_rng(5)
    params = {p: jnp.asarray(rng.normal(size=s), "float32") for p, s in SHAPES.items()}
    trainable, directions = found.start(KEY, spec, params=params)
    merged = merge(params, trainable, directions)
    for name, (path, layer) in PLACES.items():
        base = np.asarray(params[path])
        kernel = base if layer is None else base[layer]
        got = merged[path] if layer is None else merged[path][layer]
        want = kernel.astype(np.float64)
        if name in factors:
            total = kernel + expected(factors, name, 6 / 4)
            magnitude = stored[f"base_model.model.{name}.lora_magnitude_vector"]
            want = magnitude / np.linalg.norm(total, axis=0) * total
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="give params=, the base's parameter tree"):
        found.start(KEY, spec)
    plain = build_spec(
        SHAPES,
        LAYOUTS,
        dict.fromkeys(SHAPES, Rule(pattern=".*", rank=4, directions=2)),
        spec.method,
    )
    with pytest.raises(
        InputError, match="k: the adapter has DoRA, but the spec has not"
    ):
        found.start(KEY, plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_scaling_are_read_as_peft_reads_them(tmp_path, rslora):
    ranks = {
        "model.0.stack": 2,  # of the first pattern that fits
        "model.1.stack": 4,
        "model.2.stack": 4,
        "head.k": 5,  # an expression over the name's end
    }
    factors = write(
        tmp_path,
        ranks,
        use_rslora=rslora,
        rank_pattern={"0.stack": 2, r"model\..\.stack": 4, "k": 5},
        alpha_pattern={r"^model\.2\.stack": 3, "stack": 8, "ead.k": 100},
        r=1,
        target_modules=r".*\.(stack|k)",
    )
    alphas = {"model.2.stack": 3, "head.k": 6}
    found = from_peft(tmp_path, PLACES)
    made = changes(*found.start(KEY, spec_of(found.rules(directions=2))))
    for name, change in made.items():
        rank, alpha = ranks[name], alphas.get(name, 8)
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        np.testing.assert_allclose(change, expected(factors, name, scale), atol=2e-5)
    rules: Any = found.rules()
    assert [rule.scaling for rule in rules] == ["rslora" if rslora else "lora"] * 2
    ranked, scaled = found.notes
    assert ranked.startswith("stack: its layers have ranks [2, 4]; all are padded to 4")
    assert scaled.startswith("stack: its layers have 3 scales")


def test_padding_adds_nothing_and_trains(tmp_path):
    """Both factors zero would never move; so A starts as ever, beside zeros in B."""
    write(tmp_path, {"model.1.stack": 2}, r=2)
    found = from_peft(tmp_path, PLACES)
    assert found.notes == (
        "stack: 2 of 3 layers have no adapter; they get one that starts without effect",
    )
    wide = small_spec("lora", rank=5, alpha=15.0)  # the same scale
    trainable, directions = found.start(KEY, wide)
    a, b = (
        np.asarray(trainable.adapters["stack"].a),
        np.asarray(trainable.adapters["stack"].b),
    )
    assert not b[0].any()
    assert not b[1, 2:].any()
    assert b[1, :2].all()
    assert a.all()
    assert not np.asarray(delta(trainable.adapters["k"], directions["k"])).any()


def test_a_larger_rank_and_another_scale_keep_the_function(tmp_path):
    factors = write(tmp_path, ALL)
    found = from_peft(tmp_path, PLACES)
    made = changes(*found.start(KEY, small_spec("tsd", rank=6, alpha=0.7)))
    for name, change in made.items():
        np.testing.assert_allclose(change, expected(factors, name, 6 / 4), atol=1e-5)


def test_what_goes_out_comes_back_in(tmp_path):
    spec = small_spec("tsd")
    trees = random_all(0, spec)
    names = {place: name for name, place in PLACES.items()}
    to_peft(tmp_path, *trees, lambda *place: names[place], base_model="b")
    found = from_peft(tmp_path, PLACES)
    again = changes(*found.start(KEY, spec_of(found.rules(directions=2))))
    for name, change in changes(*trees).items():
        np.testing.assert_allclose(again[name], change, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_above_the_kernels_own_is_cut_to_it(tmp_path, rslora):
    factors = write(tmp_path, {"head.k": 9}, r=9, use_rslora=rslora)
    found = from_peft(tmp_path, PLACES)
    assert found.notes == ("head.k: rank 9 cut to 6, the limit of its kernel",)
    rule: Any
    (rule,) = found.rules(directions=2)
    assert rule.rank == 6
    spec = build_spec(SHAPES, LAYOUTS, {"k": rule}, get_method("tsd"))
    made = changes(*found.start(KEY, spec))["head.k"]
    scale = 6 / (3 if rslora else 9)
    np.testing.assert_allclose(made, expected(factors, "head.k", scale), atol=2e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, r"lora_magnitude_vector none, .* asks for \(7,\)"),
        ({"magnitudes": OUT}, r"lora_magnitude_vector \(7,\), .* asks for none"),
        ({"magnitudes": 6, "use_dora": True}, r"\(6,\), .* asks for \(7,\)"),
        ({"modules_to_save": ["lm_head"]}, r"none of what modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight"),
        ({"lora_bias": True}, "biases of its own"),
        (
            {"target_modules": ["stack"]},
            "tensors of head.k, which is not among target_modules",
        ),
        ({"r": 3}, r"factors \(4, 6\) and \(7, 4\), and .* gives it rank 3"),
        ({"rank_pattern": {"(": 4}}, "is not a regular expression"),
        ({"lora_alpha": 0}, "lora_alpha 0, which must be above 0"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, config, words):
    write(tmp_path, ALL, **config)
    with pytest.raises(InputError, match=words) as told:
        from_peft(tmp_path, PLACES)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(tmp_path, start):
    write(tmp_path, ALL, init_lora_weights=start, fan_in_fan_out=True)
    assert len(from_peft(tmp_path, PLACES).kernels) == 2


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("base_model.model.head.k.lora_magnitude_vector", "lacks one factor of head.k"),
        ("base_model.model.head.k.lora_magnitude", "only lora_A, lora_B and lora_mag"),
        ("base_model.model.e.lora_embedding_A", "e, which is not among target_mod"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("base_model.model.model.0.stack.lora_A.weight", "lacks one factor"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, tensor, words):
    write(tmp_path, ALL)
    save_file({tensor: np.zeros((4, 6))}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=words):
        from_peft(tmp_path, PLACES)


def test_a_pickle_is_not_opened(tmp_path):
    write(tmp_path, ALL)
    file = tmp_path / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(InputError, match="a pickle, which is not opened here"):
        from_peft(tmp_path, PLACES)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        from_peft(tmp_path, PLACES)
    write(tmp_path, ALL)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors does not exist"):
        from_peft(tmp_path, PLACES)


def test_modules_the_model_has_not_are_named_with_the_nearest(tmp_path):
    write(tmp_path, {"model.3.stack": 4})
    with pytest.raises(InputError, match=r"adapts model\.3\.stack.*nearest is model\."):
        from_peft(tmp_path, PLACES)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (small_spec("tsd", rank=3), "k: the adapter has rank 4, but the spec only 3"),
        (small_spec("tsd", shape=(IN, OUT)), "changes stack, which the spec does not"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(tmp_path, spec, words):
    write(tmp_path, ALL)
    with pytest.raises(InputError, match=words):
        from_peft(tmp_path, PLACES).start(KEY, spec)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    write(tmp_path, {"head.k": 4})
    found = from_peft(tmp_path, PLACES)
    spec = small_spec("tsd", rank=4, shape=(8, 7))
    with pytest.raises(InputError, match=r"is \(in, out\) = \(8, 7\).*another base"):
        found.start(KEY, spec)
    flat = from_peft(tmp_path, {"head.k": ("k", 0)})
    with pytest.raises(InputError, match="changes matrix 0 of it"):
        flat.start(KEY, small_spec("tsd", rank=4, shape=(6, 7)))
