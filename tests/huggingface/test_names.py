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
    assert names.module_name(path, layer) == module


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
        names.module_name(path, layer)


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
def test_module_places_invert_module_names(scan_layers):
    params = names.abstract_params(CONFIG, scan_layers=scan_layers)
    places = names.module_paths(params)
    assert len(places) == 2 * 7 + 1
    for module, (path, layer) in places.items():
        assert names.module_name(path, layer) == module
    place = ("layers/mlp/up_proj/kernel", 1)
    place = place if scan_layers else ("layers_1/mlp/up_proj/kernel", None)
    assert places["model.layers.1.mlp.up_proj"] == place
