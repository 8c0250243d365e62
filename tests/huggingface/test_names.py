from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import names
from tsd_jax.models.config import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    attention_bias=True,
)


def numbered(tree):
    """Every element a number of its own."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return structure.unflatten(
        np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape)
        for leaf, end in zip(leaves, ends, strict=True)
    )


@pytest.mark.parametrize(
    ("path", "layer", "module"),
    [
        ("layers/self_attn/q_proj/kernel", 3, "model.layers.3.self_attn.q_proj"),
        ("layers/mlp/down_proj/bias", 0, "model.layers.0.mlp.down_proj"),
        ("layers_12/mlp/up_proj/kernel", None, "model.layers.12.mlp.up_proj"),
        ("layers/input_layernorm/scale", 1, "model.layers.1.input_layernorm"),
        ("embed_tokens/embedding", None, "model.embed_tokens"),
        ("norm/scale", None, "model.norm"),
        ("lm_head/kernel", None, "lm_head"),
    ],
)
def test_module_names(path, layer, module):
    assert names.module_name(path, layer, model_type="llama") == module


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("layers/mlp/up_proj/kernel", None),
        ("layers_1/mlp/up_proj/kernel", 1),
        ("lm_head/kernel", 0),
    ],
)
def test_a_layer_belongs_to_stacked_leaves_alone(path, layer):
    with pytest.raises(ValueError, match=path):
        names.module_name(path, layer, model_type="llama")


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_abstract_params_holds_no_arrays(scan_layers, dtype):
    tree = names.abstract_params(CONFIG, dtype=dtype, scan_layers=scan_layers)
    leaves = jax.tree.leaves(tree)
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert sum(leaf.size for leaf in leaves) == 2 * 11 * 8 + 8 + 2 * (
        (8 * 8 + 8) + 2 * (8 * 4 + 4) + (8 * 8 + 8) + 3 * 8 * 12 + 2 * 8
    )


def test_tensors_are_transposed_slices_of_the_stack():
    params = numbered(names.abstract_params(CONFIG))
    tensors = names.to_huggingface(params, CONFIG)
    assert len(tensors) == 3 + 2 * (2 + 4 + 4 + 3)
    layer = params["layers"]
    for name, expected in {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
        "model.layers.1.input_layernorm.weight": layer["input_layernorm"]["scale"][1],
        "model.layers.1.self_attn.k_proj.weight": layer["self_attn"]["k_proj"][
            "kernel"
        ][1].T,
        "model.layers.0.self_attn.k_proj.bias": layer["self_attn"]["k_proj"]["bias"][0],
        "model.layers.0.mlp.down_proj.weight": layer["mlp"]["down_proj"]["kernel"][0].T,
    }.items():
        np.testing.assert_array_equal(tensors[name], expected)
        assert tensors[name].flags.c_contiguous


def test_stacked_or_not_the_tensors_are_the_same():
    params = numbered(names.abstract_params(CONFIG))
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    for n in range(2):
        rest[f"layers_{n}"] = jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"])
    stacked = names.to_huggingface(params, CONFIG)
    single = names.to_huggingface(rest, CONFIG)
    assert stacked.keys() == single.keys()
    for name, tensor in stacked.items():
        np.testing.assert_array_equal(tensor, single[name])


def test_another_models_tree_is_refused():
    params = numbered(names.abstract_params(CONFIG))
    adapted = params | {"lm_head": params["lm_head"] | {"kernel_more": np.ones(3)}}
    with pytest.raises(InputError, match=r"lm_head/kernel_more.*merge"):
        names.to_huggingface(adapted, CONFIG)
    headless = {name: tree for name, tree in params.items() if name != "lm_head"}
    with pytest.raises(InputError, match=r"lm_head/kernel.*found nothing"):
        names.to_huggingface(headless, CONFIG)
    wrong = params | {"norm": {"scale": np.ones(9)}}
    with pytest.raises(InputError, match=r"norm/scale.*\(9,\)"):
        names.to_huggingface(wrong, CONFIG)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_module_paths_invert_module_names(scan_layers):
    params = names.abstract_params(CONFIG, scan_layers=scan_layers)
    places = names.module_paths(params, "llama")
    assert len(places) == 2 * 7 + 1
    for module, (path, layer) in places.items():
        assert names.module_name(path, layer, model_type="llama") == module
    place = ("layers/mlp/up_proj/kernel", 1)
    place = place if scan_layers else ("layers_1/mlp/up_proj/kernel", None)
    assert places["model.layers.1.mlp.up_proj"] == place


@pytest.mark.parametrize(
    ("path", "index", "family", "module"),
    [
        (
            "layers/mlp/experts/up_proj/kernel",
            (3, 5),
            "qwen3_moe",
            "model.layers.3.mlp.experts.5.up_proj",
        ),
        (
            "layers_3/mlp/experts/up_proj/kernel",
            5,
            "mixtral",
            "model.layers.3.block_sparse_moe.experts.5.w3",
        ),
        (
            "layers/mlp/experts/down_proj/kernel",
            (0, 1),
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.1.w2",
        ),
        (
            "layers/mlp/gate/kernel",
            2,
            "mixtral",
            "model.layers.2.block_sparse_moe.gate",
        ),
        (
            "layers/self_attn/q_proj/kernel",
            2,
            "mixtral",
            "model.layers.2.self_attn.q_proj",
        ),
        (
            "layers/mlp/shared_expert/gate_proj/kernel",
            1,
            "qwen2_moe",
            "model.layers.1.mlp.shared_expert.gate_proj",
        ),
        (
            "layers/self_attn/qkv_proj/kernel",
            1,
            "phi3",
            "model.layers.1.self_attn.qkv_proj",
        ),
        (
            "layers/mlp/gate_up_proj/kernel",
            1,
            "phi3",
            "model.layers.1.mlp.gate_up_proj",
        ),
        (
            "layers/self_attn/q_norm/scale",
            0,
            "qwen3",
            "model.layers.0.self_attn.q_norm",
        ),
    ],
)
def test_module_names_of_other_families(path, index, family, module):
    assert names.module_name(path, index, model_type=family) == module


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("layers/mlp/experts/up_proj/kernel", 3),
        ("layers/mlp/experts/up_proj/kernel", None),
        ("layers_3/mlp/experts/up_proj/kernel", (3, 5)),
    ],
)
def test_every_stacked_axis_needs_an_index(path, index):
    with pytest.raises(ValueError, match=path):
        names.module_name(path, index, model_type="llama")


def test_a_stack_index_selects_its_matrix():
    assert names.stack_indices(()) == [None]
    assert names.stack_indices((2,)) == [0, 1]
    assert names.stack_indices((1, 2)) == [(0, 0), (0, 1)]
    array = np.arange(12).reshape(2, 2, 3)
    np.testing.assert_array_equal(array[names.axis_indices(None)], array)
    np.testing.assert_array_equal(array[names.axis_indices(1)], array[1])
    np.testing.assert_array_equal(array[names.axis_indices((1, 0))], array[1, 0])
    assert names.stacked_axes("layers/mlp/experts/up_proj/kernel") == 2
    assert names.stacked_axes("layers_0/mlp/experts/up_proj/kernel") == 1
    assert names.stacked_axes("layers_0/mlp/up_proj/kernel") == 0


@pytest.mark.parametrize("scan_layers", [True, False])
def test_tensor_paths_invert_tensor_names(scan_layers):
    params = names.abstract_params(CONFIG, scan_layers=scan_layers)
    slots = names.tensor_paths(params, "llama")
    assert slots.keys() == names.tensor_shapes(params, "llama").keys()
    layer = ("layers/mlp/up_proj/kernel", 1) if scan_layers else None
    layer = layer or ("layers_1/mlp/up_proj/kernel", None)
    assert slots["model.layers.1.mlp.up_proj.weight"] == layer
    assert slots["model.norm.weight"] == ("norm/scale", None)
