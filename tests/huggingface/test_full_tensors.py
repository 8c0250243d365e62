"""Full parameters in torch's files, against tensors written down by hand."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.full_params import (
    HEAD,
    LAYERS,
    PARTS,
    TABLE,
    D,
    V,
    module_name,
    parts,
    trees,
)
from tests.helpers.trees import random_all, small_spec
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import FullParam, FullSpec
from tsd_jax.core.spec import Spec
from tsd_jax.huggingface.full_tensors import (
    FullTensor,
    filled,
    full_rule,
    full_tensors,
    torch_rows,
)
from tsd_jax.huggingface.names import StackIndex
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft

PREFIX = "base_model.model."


def test_tensors_lie_as_torch_has_them():
    found, values = full_tensors(parts(), module_name), parts()
    assert set(found) == {
        TABLE,
        HEAD,
        *(f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("norm", "up")),
    }
    table, head = (
        np.asarray(values[path].value)
        for path in ("embed_tokens/embedding", "lm_head/kernel")
    )
    np.testing.assert_array_equal(found[TABLE].value, table)
    np.testing.assert_array_equal(found[HEAD].value, head.T)
    assert found[TABLE].rows == found[HEAD].rows == (V, V + 1)
    for n in range(LAYERS):
        up = np.asarray(values["layers/up/kernel"].value)[n]
        np.testing.assert_array_equal(found[f"model.layers.{n}.up.weight"].value, up.T)
        assert found[f"model.layers.{n}.up.weight"].rows is None


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (FullSpec(path="x/alpha", shape=(3,)), "only leaves named kernel, embedding"),
        (
            FullSpec(path="x/kernel", shape=(3, 4), rows=(0, 1)),
            "rows along axis 0 of .* are not rows of one torch",
        ),
        (
            FullSpec(path="x/kernel", shape=(2, 3, 4), rows=(0, 1), axis=1),
            "not rows of one torch",
        ),
    ],
)
def test_what_torch_has_no_place_for_is_refused(part, told):
    with pytest.raises(InputError, match=told):
        torch_rows(part)


def test_tensors_fill_full_parameters_again():
    values = parts()
    for path, part in PARTS.items():
        indices = (0, 1) if path.startswith("layers") else (None,)
        tensors = full_tensors({path: values[path]}, module_name).values()
        layers: dict[StackIndex, FullTensor] = dict(zip(indices, tensors, strict=True))
        rule = full_rule(path, layers)
        assert (rule.rows, rule.axis) == (part.rows, part.axis)
        got = filled(np.zeros(part.value_shape, np.float32), part, layers)
        np.testing.assert_array_equal(got, values[path].value)


def test_rows_may_have_gaps():
    tensor = FullTensor("e", "weight", np.ones((2, D), np.float32), (2, 4))
    assert full_rule("e/embedding", {None: tensor}).rows == (2, 5)
    part = FullSpec(path="e/embedding", shape=(V, D), rows=(2, 5))
    got = filled(np.zeros((3, D)), part, {None: tensor})
    np.testing.assert_array_equal(got[:, 0], [1, 0, 1])
    outside = FullSpec(path="e/embedding", shape=(V, D), rows=(3, 5))
    with pytest.raises(InputError, match="does not fit what the spec trains of it"):
        filled(np.zeros((2, D)), outside, {None: tensor})


def test_the_peft_folder_names_modules_and_rows(tmp_path):
    to_peft(tmp_path, *trees(), module_name, base_model="org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [
        f"model.layers.{n}.{part}" for n in (0, 1) for part in ("norm", "up")
    ]
    rows = [V, V + 1]
    indices = {"model.embed_tokens": rows, "lm_head": rows}
    assert config["trainable_token_indices"] == indices
    assert not {m for m in config["target_modules"] if "norm" in m or "head" in m}
    stored = load_file(tmp_path / "adapter_model.safetensors")
    value = parts()["embed_tokens/embedding"].value
    name = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    np.testing.assert_array_equal(stored[name], value)
    assert stored[f"{PREFIX}model.layers.0.norm.weight"].shape == (D,)
    assert len([n for n in stored if "lora" not in n]) == 6


def test_peft_gets_whole_modules(tmp_path):
    """A frozen bias goes along with its weight."""
    pair, bias = trees("layers/up/kernel"), np.ones((LAYERS, 4), np.float32)
    shapes = {"layers": {"up": {"bias": jax.ShapeDtypeStruct(bias.shape, "float32")}}}
    with pytest.raises(InputError, match="layers/up/bias belongs to one: give params"):
        to_peft(tmp_path, *pair, module_name, base_model="b", params=shapes)
    params = {"layers": {"up": {"bias": bias}}, "k": 0, "stack": 0}
    to_peft(tmp_path, *pair, module_name, base_model="b", params=params)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(stored[f"{PREFIX}model.layers.1.up.bias"], bias[1])


def test_a_part_beside_an_adapter_is_refused(tmp_path):
    trainable, directions = random_all(0, small_spec("tsd"))
    adapters = {"k/kernel": trainable.adapters["k"]}
    bias = FullParam(jnp.ones(7), FullSpec(path="k/bias", shape=(7,)))
    with pytest.raises(
        InputError, match="k/bias is trained in full and the kernel beside"
    ):
        to_peft(
            tmp_path,
            Trainable(adapters=adapters, full={"k/bias": bias}),
            {"k/kernel": directions["k"]},
            lambda path, index: "m",
            base_model="b",
        )
    assert not list(tmp_path.iterdir())


def test_experts_are_refused(tmp_path):
    path = "layers/mlp/experts/up_proj/kernel"
    part = FullParam(jnp.ones((2, 3, 4, 5)), FullSpec(path=path, shape=(2, 3, 4, 5)))
    trainable, directions = trees("layers/norm/scale")
    trainable = trainable.replace(full={**trainable.full, path: part})
    with pytest.raises(InputError, match="fuses the experts of a mixture"):
        to_peft(tmp_path, trainable, directions, module_name, base_model="b")


PLACES = {"model.k": ("k", None)} | {
    f"model.layers.{n}.stack": ("stack", n) for n in range(3)
}
TENSORS = {TABLE: ("embed_tokens/embedding", None), HEAD: ("lm_head/kernel", None)} | {
    f"model.layers.{n}.{part}.weight": (f"layers/{part}/{leaf}", n)
    for n in range(LAYERS)
    for part, leaf in (("norm", "scale"), ("up", "kernel"))
}


def test_full_parameters_are_read_back(tmp_path):
    to_peft(tmp_path, *trees(), module_name, base_model="org/base")
    found = from_peft(tmp_path, PLACES, TENSORS)
    assert found.full.keys() == PARTS.keys()
    base = small_spec("lora", rank=found.kernels["k"][None].rank)
    spec = Spec(base.kernels, base.method, tuple(PARTS.values()))
    flat = {path: jnp.zeros(part.shape) for path, part in PARTS.items()}
    params: dict = {"layers": {}}
    for path, leaf in flat.items():
        *above, module, name = path.split("/")
        (params["layers"] if above else params)[module] = {name: leaf}
    trainable, _ = found.start(jax.random.key(0), spec, params=params)
    for path, part in parts().items():
        np.testing.assert_array_equal(trainable.full[path].value, part.value)
    with pytest.raises(InputError, match="changes lm_head/kernel, which the"):
        found.start(jax.random.key(0), base)
    with pytest.raises(InputError, match=r"lm_head\.weight alone, but the model has"):
        from_peft(tmp_path, PLACES, {TABLE: TENSORS[TABLE]})


def test_an_adapter_at_odds_with_itself_is_refused(tmp_path):
    to_peft(tmp_path, *trees(), module_name, base_model="org/base")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    indices = {"model.embed_tokens": [V], "lm_head": [V, V + 1]}
    file.write_text(json.dumps(config | {"trainable_token_indices": indices}))
    with pytest.raises(InputError, match=r"rows of shape \(2, 3\).*names 1 of them"):
        from_peft(tmp_path, PLACES, TENSORS)
