from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tsd_jax.core.adapter import Adapter, Directions, Trainable, low_rank_factors
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.spec import KernelSpec
from tsd_jax.huggingface.peft.write import PeftExport, to_peft

LAYERS, IN, OUT, GAMMA = 3, 6, 5, 1.5


def module_name(path: str, layer: int | None) -> str:
    name = path.removesuffix("/kernel").replace("/", ".")
    return f"model.{name}" if layer is None else f"model.{layer}.{name}"


def adapter(
    path: str,
    batch: tuple[int, ...] = (),
    rank: int = 2,
    columns: int = 3,
    dora: bool = False,
) -> tuple[Adapter, Directions]:
    """An adapter after launch, every value random."""
    rng = np.random.default_rng(len(path) + rank)

    def random(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=(*batch, *shape)), jnp.float32)

    stack = len(batch)
    magnitude = abs(random(OUT)) + 1 if dora else None
    kernel = KernelSpec(
        path=path,
        shape=(*batch, IN, OUT),
        layout=Layout(tuple(range(stack)), (stack,), (stack + 1,)),
        rank=rank,
        alpha=GAMMA * rank,
        scale=GAMMA,
        gains=2,
        ranked=columns,
        columns=columns,
        dropout=0.0,
        dora=dora,
    )
    return (
        Adapter(random(IN, rank), random(rank, OUT), random(2), kernel, magnitude),
        Directions(random(IN, columns), random(OUT, columns), random(columns)),
    )


def collect(**named: tuple[Adapter, Directions]) -> tuple[Trainable, dict]:
    adapters = {a.kernel.path: a for a, _ in named.values()}
    return Trainable(adapters=adapters), {a.kernel.path: d for a, d in named.values()}


def expected_delta(adapter: Adapter, directions: Directions) -> np.ndarray:
    """dK = gamma A B + L diag(g + o) R^T, in float64."""
    a, b, gain = (
        np.asarray(x, np.float64) for x in (adapter.a, adapter.b, adapter.gain)
    )
    left, right, offset = (
        np.asarray(x, np.float64)
        for x in (directions.left, directions.right, directions.offset)
    )
    coordinates = offset.copy()
    coordinates[..., : gain.shape[-1]] += gain
    along = (left * coordinates[..., None, :]) @ right.swapaxes(-1, -2)
    return GAMMA * a @ b + along


def by_pattern(patterns: dict[str, int], module: str, default: int) -> int:
    """The first pattern that fits the end of a module's name, as PEFT takes it."""
    fitting = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
    return patterns.get(next(fitting, ""), default)


def stored(folder, module: str) -> tuple[np.ndarray, int]:
    """What PEFT adds to the module's torch weight, and the rank, by its own rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    low = tensors[f"base_model.model.{module}.lora_A.weight"]
    high = tensors[f"base_model.model.{module}.lora_B.weight"]
    rank = by_pattern(config["rank_pattern"], module, config["r"])
    alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    assert low.shape == (rank, IN)
    assert high.shape == (OUT, rank)
    assert low.dtype == high.dtype == np.float32
    return alpha / rank * high.astype(np.float64) @ low.astype(np.float64), rank


def test_every_layer_of_a_stack_gets_its_own_change(tmp_path):
    pair = adapter("attn/q/kernel", (LAYERS,))
    export = to_peft(tmp_path, *collect(q=pair), module_name, base_model="base")
    assert export == PeftExport(2 + 3, {}, 0.0)
    changes = expected_delta(*pair)
    for layer in range(LAYERS):
        change, rank = stored(tmp_path, f"model.{layer}.attn.q")
        np.testing.assert_allclose(change, changes[layer].T, atol=1e-6)
        assert rank == 5
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * LAYERS


def test_ranks_may_differ(tmp_path):
    pairs = {"q": adapter("q/kernel"), "up": adapter("up/kernel", rank=4)}
    export = to_peft(tmp_path, *collect(**pairs), module_name, base_model="base")
    assert export.rank == 7
    for name, pair in pairs.items():
        change, rank = stored(tmp_path, f"model.{name}")
        np.testing.assert_allclose(change, expected_delta(*pair).T, atol=1e-6)
        assert rank == {"q": 5, "up": 7}[name]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.q": 5}


def test_before_launch_only_a_and_b_are_written(tmp_path):
    trained, frozen = adapter("q/kernel")
    frozen = jax.tree.map(jnp.zeros_like, frozen)
    pair = (trained, frozen)
    export = to_peft(tmp_path, *collect(q=pair), module_name, base_model="b")
    assert export.rank == 2
    change, _ = stored(tmp_path, "model.q")
    a, b = np.asarray(trained.a, np.float64), np.asarray(trained.b, np.float64)
    np.testing.assert_allclose(change, GAMMA * (a @ b).T, atol=1e-6)


def test_directions_that_nothing_uses_are_left_out(tmp_path):
    """A gate closes on two gains of one layer; there, one direction has no offset."""
    trained, frozen = adapter("q/kernel", (LAYERS,))
    gate = jnp.ones((LAYERS, 2)).at[1].set(0)
    offset = frozen.offset.at[1].set(jnp.array([0.0, 0.5, 0.0]))
    frozen = frozen.replace(gate=gate, offset=offset)
    to_peft(tmp_path, *collect(q=(trained, frozen)), module_name, base_model="b")
    gated = trained.replace(gain=trained.gain * gate)
    changes = expected_delta(gated, frozen)
    for layer, expected in enumerate((5, 3, 5)):
        change, rank = stored(tmp_path, f"model.{layer}.q")
        np.testing.assert_allclose(change, changes[layer].T, atol=1e-6)
        assert rank == expected


def test_before_training_all_of_a_is_written(tmp_path):
    trained, _ = adapter("q/kernel")
    pair = (trained.replace(b=0 * trained.b, gain=None), Directions(None, None, None))
    export = to_peft(tmp_path, *collect(q=pair), module_name, base_model="b")
    assert export.rank == 2


def test_plain_lora_has_no_directions(tmp_path):
    trained, _ = adapter("q/kernel")
    nothing = Directions(None, None, None)
    pair = (trained.replace(gain=None), nothing)
    export = to_peft(tmp_path, *collect(q=pair), module_name, base_model="b")
    assert export.rank == 2


def test_a_change_of_nothing_still_has_a_rank(tmp_path):
    trained, _ = adapter("q/kernel")
    pair = (trained.replace(a=0 * trained.a, gain=None), Directions(None, None, None))
    export = to_peft(tmp_path, *collect(q=pair), module_name, base_model="b")
    assert export.rank == 1


def test_magnitudes_are_written_as_peft_names_them(tmp_path):
    pairs = collect(
        q=adapter("attn/q/kernel", (LAYERS,), dora=True),
        up=adapter("mlp/up/kernel", dora=True),
    )
    to_peft(tmp_path, *pairs, module_name, base_model="org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    found = {name: x for name, x in tensors.items() if "magnitude" in name}
    prefix, suffix = "base_model.model.model", "lora_magnitude_vector"
    want = {f"{prefix}.mlp.up.{suffix}": pairs[0].adapters["mlp/up/kernel"].magnitude}
    for layer in range(LAYERS):
        magnitude = pairs[0].adapters["attn/q/kernel"].magnitude[layer]
        want[f"{prefix}.{layer}.attn.q.{suffix}"] = magnitude
    assert found.keys() == want.keys()
    for name, magnitude in want.items():
        np.testing.assert_array_equal(found[name], magnitude)


def test_dora_beside_plain_kernels_is_refused_before_anything_is_written(tmp_path):
    pairs = collect(q=adapter("attn/q/kernel", dora=True), up=adapter("mlp/up/kernel"))
    words = "model.attn.q has DoRA and model.mlp.up does not, but PEFT has one use_dora"
    with pytest.raises(InputError, match=words):
        to_peft(tmp_path / "new", *pairs, module_name, base_model="org/base")
    assert not (tmp_path / "new").exists()


def test_config_is_that_of_a_plain_causal_lora(tmp_path):
    pairs = collect(q=adapter("attn/q/kernel", (LAYERS,)))
    to_peft(tmp_path / "new" / "folder", *pairs, module_name, base_model="org/base")
    config = json.loads(
        (tmp_path / "new" / "folder" / "adapter_config.json").read_text()
    )
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert (config["bias"], config["lora_dropout"]) == ("none", 0.0)
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert not config["fan_in_fan_out"]


@pytest.mark.parametrize(
    ("kernels", "targets"),
    [
        (None, ["model.0.attn.q", "model.1.attn.q", "model.2.attn.q", "model.mlp.up"]),
        (["attn/q", "mlp/up", "mlp/down"], ["q", "up"]),
        (["attn/q", "mlp/up", "head/up"], ["model.mlp.up", "q"]),
    ],
)
def test_modules_are_named_shortly_only_where_that_is_exact(tmp_path, kernels, targets):
    pairs = collect(q=adapter("attn/q/kernel", (LAYERS,)), up=adapter("mlp/up/kernel"))
    params: Any = kernels and {}
    for kernel in kernels or ():
        outer, inner = kernel.split("/")
        params.setdefault(outer, {})[inner] = {"kernel": 0, "bias": 0}
    to_peft(tmp_path, *pairs, module_name, base_model="b", params=params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == targets


def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        to_peft(tmp_path, Trainable(), {}, module_name, base_model="b")
    assert not list(tmp_path.iterdir())


def test_every_expert_of_every_layer_is_a_module(tmp_path):
    def name(path: str, index: tuple[int, int]) -> str:
        return "model.layers.{}.experts.{}.up".format(*index)

    pairs = collect(up=adapter("up/kernel", (2, 3)))
    to_peft(tmp_path, *pairs, name, base_model="b")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kernel, directions = pairs[0].adapters["up/kernel"], pairs[1]["up/kernel"]
    down, up = low_rank_factors(kernel, directions)
    for layer in range(2):
        for expert in range(3):
            module = f"base_model.model.model.layers.{layer}.experts.{expert}.up"
            a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
            want = np.asarray(down[layer, expert] @ up[layer, expert])
            np.testing.assert_allclose((b @ a).T, want, atol=1e-5)
    assert len(tensors) == 2 * 6


def test_a_name_that_ends_like_another_keeps_its_own_rank(tmp_path):
    """PEFT matches the end of a name: "model.q" would also take "deep.model.q"."""

    def name(path: str, layer: int | None) -> str:
        return path.removesuffix("/kernel").replace("/", ".")

    pairs = {
        "q": adapter("model/q/kernel"),
        "deep": adapter("deep/model/q/kernel", rank=4),
    }
    to_peft(tmp_path, *collect(**pairs), name, base_model="base")
    for module, pair in (("model.q", pairs["q"]), ("deep.model.q", pairs["deep"])):
        change, _ = stored(tmp_path, module)
        np.testing.assert_allclose(change, expected_delta(*pair).T, atol=1e-6)


def truncated(dense: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of a rank, by the dense SVD in float64."""
    u, s, v_t = np.linalg.svd(dense)
    return (u[:, :rank] * s[:rank]) @ v_t[:rank]


@pytest.mark.parametrize("max_rank", [1, 3])
def test_max_rank_gives_the_best_approximation_and_its_error(
    tmp_path, caplog, max_rank
):
    caplog.set_level("INFO")
    pairs = {"q": adapter("attn/q/kernel", (LAYERS,)), "up": adapter("up/kernel")}
    export = to_peft(
        tmp_path, *collect(**pairs), module_name, base_model="b", max_rank=max_rank
    )
    assert export.rank == max_rank
    dense = {f"model.{n}.attn.q": d for n, d in enumerate(expected_delta(*pairs["q"]))}
    dense["model.up"] = expected_delta(*pairs["up"])
    lost = {}
    for module, change in dense.items():
        best = truncated(change, max_rank)
        found, rank = stored(tmp_path, module)
        assert rank == max_rank
        np.testing.assert_allclose(found, best.T, atol=2e-6)
        lost[module] = np.linalg.norm(change - best)
        relative = lost[module] / np.linalg.norm(change)
        assert relative > 0.01
        assert export.errors[module] == pytest.approx(relative, rel=1e-5)
    whole = np.linalg.norm([np.linalg.norm(change) for change in dense.values()])
    expected = np.linalg.norm(list(lost.values())) / whole
    assert export.error == pytest.approx(expected, rel=1e-5)
    assert f"model.up: cut to rank {max_rank}" in caplog.text


def test_max_rank_leaves_what_fits_as_it_is(tmp_path):
    pairs = {"q": adapter("q/kernel"), "up": adapter("up/kernel", rank=1, columns=2)}
    to_peft(tmp_path / "all", *collect(**pairs), module_name, base_model="b")
    export = to_peft(
        tmp_path / "cut", *collect(**pairs), module_name, base_model="b", max_rank=3
    )
    assert set(export.errors) == {"model.q"}
    assert export.rank == 3
    whole, cut = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("all", "cut")
    )
    for name in whole:
        if ".up." in name:
            np.testing.assert_array_equal(whole[name], cut[name])


def test_max_rank_refuses_what_has_no_svd(tmp_path):
    trained, frozen = adapter("q/kernel")
    pairs = collect(q=(trained, frozen))
    with pytest.raises(InputError, match="max_rank must be at least 1, not 0"):
        to_peft(tmp_path, *pairs, module_name, base_model="b", max_rank=0)
    broken = collect(q=(trained.replace(a=trained.a * np.nan), frozen))
    for rank in (1, None):
        with pytest.raises(InputError, match=r"adapter of .*q holds .* not finite"):
            to_peft(tmp_path, *broken, module_name, base_model="b", max_rank=rank)
    assert not list(tmp_path.iterdir())


def test_two_kernels_of_one_name_are_refused(tmp_path):
    pairs = collect(q=adapter("q/kernel"), up=adapter("up/kernel"))
    with pytest.raises(InputError, match="has the module name 'same' already"):
        to_peft(tmp_path, *pairs, lambda path, layer: "same", base_model="b")


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    pairs = collect(q=adapter("q/kernel"))
    with pytest.raises(InputError, match=r"cannot write .*taken"):
        to_peft(tmp_path / "taken", *pairs, module_name, base_model="b")


@pytest.mark.parametrize(
    ("start", "task"),
    [
        ("model", "CAUSAL_LM"),
        ("roberta", "SEQ_CLS"),
        ("deberta", "SEQ_CLS"),
        ("my", None),
    ],
)
def test_the_task_is_that_of_the_family(tmp_path, start, task):
    def named(path, index):
        return module_name(path, index).replace("model", start, 1)

    pairs = collect(q=adapter("attn/q/kernel", (LAYERS,)))
    named_task: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION"}
    for given, want in (({}, task), (named_task, None)):
        to_peft(tmp_path, *pairs, named, base_model="org/base", **given)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written["task_type"] == given.get("task_type", want)
