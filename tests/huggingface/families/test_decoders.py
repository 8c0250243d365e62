"""What each family's config.json and tensor names say, and what is refused."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.decoders import PUBLISHED, random_tensor, write_decoder
from tsd_jax import huggingface
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import names
from tsd_jax.huggingface.config import config_json, read_config
from tsd_jax.huggingface.families.encoders import ENCODERS
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.models.config import Experts
from tsd_jax.models.decoder import DECODER_RULES
from tsd_jax.models.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    YarnScaling,
)


def written(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_every_family_has_a_small_model():
    assert PUBLISHED.keys() == FAMILIES.keys() - ENCODERS.keys()
    for name, published in PUBLISHED.items():
        assert published["architectures"] == [FAMILIES[name].architecture]


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_written_is_read_back(tmp_path, family):
    config = read_config(written(tmp_path, PUBLISHED[family]))
    assert config.model_type == family
    assert read_config(written(tmp_path, config_json(config, "float32"))) == config


SCALINGS = {
    "linear": ({"factor": 3.0}, LinearScaling(3.0)),
    "dynamic": ({"factor": 2}, DynamicScaling(2, 64)),
    "llama3": (
        PUBLISHED["llama"]["rope_scaling"],
        Llama3Scaling(8.0, 1.0, 4.0, 16),
    ),
    "yarn": (
        {"factor": 4.0, "mscale": 0.5, "beta_fast": None, "truncate": False},
        YarnScaling(4.0, 64, mscale=0.5, truncate=False),
    ),
    "longrope": (
        {"short_factor": [1, 2.0, 3.0, 4.0], "long_factor": [2.0] * 4}
        | {"original_max_position_embeddings": 16},
        LongRope((1, 2.0, 3.0, 4.0), (2.0,) * 4, 4.0, 16),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_name", ["type", "rope_type"])
def test_every_scaling_is_read_and_written(tmp_path, kind, place, type_name):
    settings, expected = SCALINGS[kind]
    settings = {n: v for n, v in settings.items() if n != "rope_type"}
    content = {n: v for n, v in PUBLISHED["llama"].items() if n != "rope_scaling"}
    content[place] = {type_name: kind, "rope_theta": 7.0, **settings}
    config = read_config(written(tmp_path, content))
    assert config.rope_scaling == expected
    assert config.rope_theta == 7.0
    assert read_config(written(tmp_path, config_json(config, "float32"))) == config


def test_where_a_file_is_silent_the_family_speaks(tmp_path):
    few = ("architectures", "model_type", "vocab_size", "hidden_size")
    few += ("intermediate_size", "num_hidden_layers", "num_attention_heads")

    def silent(family, **more):
        content = {name: PUBLISHED[family][name] for name in few} | more
        return read_config(written(tmp_path, content))

    assert silent("mistral", num_attention_heads=8).sliding_window == 4096
    assert silent("mistral", num_attention_heads=8).num_key_value_heads == 8
    assert silent("mixtral", num_attention_heads=8).experts == Experts(8, 2, 48)
    assert silent("qwen3", num_attention_heads=32).head_dim == 128
    gemma = silent("gemma2")
    assert (gemma.head_dim, gemma.query_pre_attn_scalar) == (256, 256)
    assert gemma.windowed == (True, False, True, False)
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (50, 30)
    gemma = silent("gemma3_text", num_hidden_layers=7)
    assert (gemma.rope_theta, gemma.rope_local_theta) == (1e6, 1e4)
    assert gemma.windowed == (True,) * 5 + (False, True)
    assert silent("smollm3").rope_layers == (True, True, True, False)
    assert silent("phi3").num_key_value_heads == 4


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"model_type": "gemma3"}, "model_type is 'gemma3'"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("qwen3", {"architectures": ["Qwen3ForTokenClassification"]}, "architectures"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, "quantization"),
        ("gemma2", {"hidden_activation": "relu"}, "'relu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (
            "gemma2",
            {"layer_types": ["full_attention"] * 5},
            "layer_types",
        ),
        ("gemma2", {"sliding_window": 0}, "sliding_window"),
        ("gemma2", {"sliding_window": "5"}, "sliding_window"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "linear",
        ),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("mixtral", {"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ("mixtral", {"num_local_experts": 0}, "num_experts"),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "mrope"),
        ("llama", {"rope_scaling": {"rope_theta": "1e4"}}, "rope_theta"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "linear"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -2}}, "factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}},
            "short_factor",
        ),
        ("phi3", {"partial_rotary_factor": 0.4}, "head_dim"),
        ("smollm3", {"no_rope_layers": [1]}, "rope_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, family, change, named):
    with pytest.raises(InputError, match=named) as caught:
        read_config(written(tmp_path, PUBLISHED[family] | change))
    assert str(caught.value).count("config.json") == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_experts_are_stacked_in_order_and_cut_over_devices(tmp_path, scan_layers):
    write_decoder(tmp_path, PUBLISHED["mixtral"])
    config = read_config(tmp_path)
    shapes = names.flatten(huggingface.abstract_params(config, scan_layers=scan_layers))
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    specs = {
        path: next(
            spec for pattern, spec in DECODER_RULES if re.fullmatch(pattern, path)
        )
        for path in shapes
    }
    specs["embed_tokens/embedding"] = specs["lm_head/kernel"] = P()  # 67 is odd
    first = "layers" if scan_layers else "layers_2"
    up, down = (f"{first}/mlp/experts/{each}_proj/kernel" for each in ("up", "down"))
    assert specs[up][-2:] == ("fsdp", "tensor")
    assert specs[down][-2:] == ("tensor", "fsdp")
    assert len(specs[up]) == len(specs[down]) == len(shapes[up].shape)
    assert specs[f"{first}/mlp/gate/kernel"] == P()
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    params = names.flatten(
        huggingface.load_params(
            tmp_path, config, scan_layers=scan_layers, shardings=shardings
        )
    )
    assert params[up].addressable_shards[0].data.shape[-2:] == (16, 24)
    kernel = np.asarray(params[up][2] if scan_layers else params[up])[3]
    name = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    np.testing.assert_array_equal(kernel, random_tensor(name, (48, 32)).T)
    again = names.to_huggingface(
        huggingface.load_params(tmp_path, config, scan_layers=scan_layers), config
    )
    for name, tensor in again.items():
        np.testing.assert_array_equal(tensor, random_tensor(name, tensor.shape))


def test_fused_projections_stay_fused(tmp_path):
    write_decoder(tmp_path, PUBLISHED["phi3"])
    config = read_config(tmp_path)
    params = huggingface.load_params(tmp_path, config)
    assert params["layers"]["self_attn"].keys() == {"qkv_proj", "o_proj"}
    assert params["layers"]["mlp"].keys() == {"gate_up_proj", "down_proj"}
    assert params["layers"]["self_attn"]["qkv_proj"]["kernel"].shape == (4, 32, 64)
    assert params["layers"]["mlp"]["gate_up_proj"]["kernel"].shape == (4, 32, 96)
