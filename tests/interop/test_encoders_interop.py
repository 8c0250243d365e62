"""Encoders are those of transformers: same files, same logits, whoever wrote them."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from tests.helpers.compiled import QUICK
from tests.helpers.encoders import PUBLISHED, inputs, write_encoder
from tsd_jax import huggingface
from tsd_jax.huggingface.families.registry import FAMILIES

torch = pytest.importorskip("torch")
from tests.helpers.stock import stock_model

TOLERANCE = 2e-4
# Less time to compile; the ordinary programs are held against goldens.
# {id: (name, changes of its published config)}; None takes an entry away.
CASES = {
    **{name: (name, {}) for name in PUBLISHED},
    "bert of one head": ("bert", {"num_attention_heads": 1, "type_vocab_size": 3}),
    "bert gelu_new": ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "bert relu": ("bert", {"hidden_act": "relu", "pad_token_id": 5}),
    "bert of one number": (
        "bert",
        {"id2label": {"0": "score"}, "problem_type": "regression"},
    ),
    "roberta of two types": ("roberta", {"type_vocab_size": 2, "pad_token_id": 3}),
    "roberta of one number": ("roberta", {"id2label": {"0": "score"}}),
    "deberta of c2p": ("deberta-v3", {"pos_att_type": ["c2p"], "norm_rel_ebd": "none"}),
    "deberta of p2c": ("deberta-v3", {"pos_att_type": "p2c", "share_att_key": False}),
    "deberta of its own keys": (
        "deberta-v3",
        {"share_att_key": False, "position_buckets": 6, "pooler_hidden_act": "tanh"},
    ),
    "deberta without buckets": (
        "deberta-v3",
        {"position_buckets": -1, "max_relative_positions": 9},
    ),
    "deberta of many buckets": ("deberta-v3", {"position_buckets": 32}),
    "deberta of absolute positions": (
        "deberta-v3",
        {"position_biased_input": True, "type_vocab_size": 2, "embedding_size": 20},
    ),
    "deberta of a wide convolution": (
        "deberta-v2",
        {"conv_kernel_size": 5, "conv_groups": 4, "conv_act": None},
    ),
}


def content_of(case):
    name, changes = CASES[case]
    content = {**PUBLISHED[name], **changes}
    return {key: value for key, value in content.items() if value is not None}


def random_torch_model(folder, auto=transformers.AutoModelForSequenceClassification):
    """The stock model of a config.json; norms and biases too are random."""
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = float("LayerNorm.weight" in name)
            # What ends in a tanh must not saturate.
            ends = "pooler" in name or "classifier.dense" in name
            parameter.normal_(center, 0.15 if ends else 0.4)
    return model.float().eval()


def torch_logits(model, tokens, mask=None, types=None):
    arguments = {"attention_mask": mask, "token_type_ids": types}
    given = {
        name: torch.from_numpy(value.astype(int))
        for name, value in arguments.items()
        if value is not None
    }
    with torch.no_grad():
        return model(torch.from_numpy(tokens), **given)[0].numpy()


def network(config, **settings):
    return FAMILIES[config.model_type].kind.network(config, **settings)


def our_logits(config, params, *arguments, **settings):
    apply = jax.jit(network(config, **settings).apply, compiler_options=QUICK)
    return np.asarray(apply({"params": params}, *arguments))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    content = content_of(case)
    model, saved = stock_model(content, tmp_path, random_torch_model)
    config = huggingface.read_config(saved)
    params = huggingface.load_params(saved, config)
    tokens, mask, types = inputs(content)

    expected = torch_logits(model, tokens, mask, types)
    plain = torch_logits(model, tokens)
    assert expected.shape == (3, len(content["id2label"]))
    assert np.abs(expected).max() > 0.3
    assert np.abs(expected - plain)[:2].max() > 100 * TOLERANCE  # the mask matters
    found = our_logits(config, params, tokens, None, mask, types)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    if case in PUBLISHED:  # without a mask, other code runs
        found = our_logits(config, params, tokens)
        np.testing.assert_allclose(found, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_hidden_states_of_a_file_without_head_or_prefix(tmp_path, name):
    content = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = random_torch_model(tmp_path, transformers.AutoModel)
    model.save_pretrained(tmp_path)
    assert not any(
        tensor.startswith(("bert.", "roberta.", "deberta."))
        for tensor in load_file(tmp_path / "model.safetensors")
    )
    config = huggingface.read_config(tmp_path)
    assert config.num_labels == 0
    params = huggingface.load_params(tmp_path, config, scan_layers=False)
    tokens, mask, types = inputs(content)
    given = (tokens, None, mask, types)
    found = our_logits(config, params, *given, scan_layers=False)
    expected = torch_logits(model, tokens, mask, types)
    np.testing.assert_allclose(found[mask], expected[mask], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pretrained_file_gives_all_but_its_head(tmp_path, name):
    content = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = random_torch_model(tmp_path, transformers.AutoModelForMaskedLM)
    model.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    assert config.num_labels == 0
    params = huggingface.load_params(tmp_path, config)
    tokens, mask, types = inputs(content)
    found = our_logits(config, params, tokens, None, mask, types)
    base = getattr(model, model.base_model_prefix)
    expected = torch_logits(base, tokens, mask, types)
    np.testing.assert_allclose(found[mask], expected[mask], atol=TOLERANCE, rtol=0)

    asked = dataclasses.replace(config, num_labels=2)
    fresh = huggingface.absent_head(tmp_path, asked)
    modules = {"roberta": ("dense", "out_proj")}.get(name, ("dense", "classifier"))
    assert {path.split("/")[-2] for path in fresh} == {*modules}
    assert len(fresh) == 4
    headed = huggingface.load_params(tmp_path, asked, head_key=jax.random.key(0))
    out = our_logits(asked, headed, tokens, None, mask, types)
    assert out.shape == (3, 2)
    assert 0 < np.abs(out).max() < 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_we_write(tmp_path, name):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_encoder(first, PUBLISHED[name])
    tokens, mask, types = inputs(PUBLISHED[name])
    config = huggingface.read_config(first)
    params = huggingface.load_params(first, config)
    bare = dataclasses.replace(config, num_labels=0, label_names=())
    headless = huggingface.load_params(first, bare)
    for written, tree, auto in (
        (config, params, transformers.AutoModelForSequenceClassification),
        (bare, headless, transformers.AutoModel),
    ):
        huggingface.write_checkpoint(second, written, tree)
        assert huggingface.read_config(second) == written
        logits = []
        for folder in (first, second):
            model, info = auto.from_pretrained(folder, output_loading_info=True)
            assert folder == first or not info["mismatched_keys"]
            assert folder == first or not info["unexpected_keys"]
            absent = {key.split(".")[0] for key in info["missing_keys"]}
            assert absent <= ({"pooler"} if written is bare else set())
            logits.append(torch_logits(model.eval(), tokens, mask, types))
        np.testing.assert_array_equal(*logits)
