"""DoRA as stock PEFT has it: the same logits and gradients, both ways round."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.helpers.trees import without_gains
from tests.interop.test_peft_interop import (
    ALL,
    TOKENS,
    our_logits,
    our_model,
    peft_adapter,
    randomised,
    torch_logits,
)
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Trainable, merge
from tsd_jax.core.initialization import init
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch
from tsd_jax.huggingface import module_paths, names
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.storage.adapter_file import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

module_name = functools.partial(names.module_name, model_type="llama")

DORA = [
    Rule(
        pattern=ALL[0].pattern,
        rank=4,
        alpha=8,
        directions=3,
        dora=True,
        scaling=scaling,
    )
    for scaling in ("lora", "rslora")
]
# Method, whether it is launched, and the rank of what is exported.
METHODS = {
    "lora": (get_method("lora"), True, 4),
    "tsd before launch": (get_method("tsd"), False, 4),
    "dash": (get_method("dash"), True, 4 + 3),
    "init": (get_method("init"), True, 4 + 4),
    "tsd": (get_method("tsd"), True, 4 + 4),
    "init, keep": (get_method("init", keep=True), True, 4 + 4 + 4),
    "tsd, keep": (get_method("tsd", keep=True), True, 4 + 4 + 4),
    "pissa": (get_method("pissa"), True, 4 + 4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with biases on q, k, v and o, written by transformers."""
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_bias=True,
    )
    torch.manual_seed(0)
    stock = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
    stock.save_pretrained(folder)
    return folder


def moved(trainable, seed):
    """Move every leaf as training does; magnitudes by a fifth."""
    made = {}
    for n, (path, adapter) in enumerate(trainable.adapters.items()):
        plain = adapter.replace(magnitude=None)
        step = randomised(plain, seed + n)
        rng = np.random.default_rng(seed + n)
        share = 1 + 0.2 * rng.normal(size=adapter.magnitude.shape)
        made[path] = jax.tree.map(jnp.add, plain, step).replace(
            magnitude=jnp.asarray(adapter.magnitude * share, jnp.float32)
        )
    return Trainable(adapters=made)


def trained(model, params, method, *, launched=True, rules=DORA[:1]):
    """Adapters as after a run: moved, launched, and moved again."""
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method=method)
    trainable, directions = init(jax.random.key(0), spec, params=params)
    trainable = moved(trainable, 1)
    if spec.method.launches and launched:
        trainable = without_gains(trainable)
        trainable, directions, _ = launch(params, trainable, spec)
        trainable = moved(trainable, 20)
    return spec, trainable, directions


def close(ours, theirs):
    """Compare logits to float32's rounding."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(("method", "launched", "rank"), METHODS.values(), ids=METHODS)
def test_logits_are_ours(base, tmp_path, method, launched, rank):
    model, params = our_model(base)
    rules = [DORA[rank < 7]]  # some with alpha / r, some with alpha / sqrt(r)
    _, trainable, directions = trained(
        model, params, method, launched=launched, rules=rules
    )
    written = to_peft(
        tmp_path,
        trainable,
        directions,
        module_name,
        base_model=str(base),
        params=params,
    )
    assert written.rank == rank
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]
    theirs, modules = torch_logits(base, tmp_path)
    assert modules == 3 * 7
    close(our_logits(model, params, trainable, directions), theirs)
    assert np.abs(torch_logits(base)[0] - theirs).max() > 1


def test_gradients_are_those_of_peft(base, tmp_path):
    """Of A, B and m of one module in the middle, through all that lies behind it."""
    model, params = our_model(base)
    _, trainable, directions = trained(model, params, "lora")
    to_peft(tmp_path, trainable, directions, module_name, base_model=str(base))
    stock = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.PeftModel.from_pretrained(stock, tmp_path, is_trainable=True)
    (stock(torch.from_numpy(TOKENS)).logits ** 2).sum().backward()
    theirs = dict(stock.named_parameters())

    def loss(trainable):
        variables = {"params": bind(params, trainable, directions)}
        return jnp.sum(adapted(model.apply)(variables, TOKENS) ** 2)

    grads = jax.jit(jax.grad(loss))(trainable)
    for path, name in (
        ("layers/self_attn/q_proj/kernel", "self_attn.q_proj"),
        ("layers/mlp/down_proj/kernel", "mlp.down_proj"),
    ):
        ours = jax.tree.map(lambda x: np.asarray(x[1]), grads.adapters[path])
        # There gamma is in lora_B: B has 1 / gamma of its gradient.
        gamma = grads.adapters[path].kernel.scale
        for got, leaf in (
            (ours.magnitude, "lora_magnitude_vector.default.weight"),
            (ours.a.T, "lora_A.default.weight"),
            (ours.b.T / gamma, "lora_B.default.weight"),
        ):
            full = f"base_model.model.model.layers.1.{name}.{leaf}"
            want = theirs[full].grad.numpy()
            bound = 1e-4 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def test_a_compressed_adapter_keeps_its_magnitudes(base, tmp_path):
    """m o (K + dK') / ||K + dK'||, dK' of rank 3; PEFT says the same of it."""
    model, params = our_model(base)
    _, trainable, directions = trained(model, params, "lora")
    export = to_peft(
        tmp_path, trainable, directions, module_name, base_model=str(base), max_rank=3
    )
    assert export.rank == 3
    assert 0.01 < export.error < 0.9
    found = from_peft(tmp_path, module_paths(params, "llama"))
    path = "layers/mlp/up_proj/kernel"
    for layer, module in found.kernels[path].items():
        np.testing.assert_array_equal(
            module.magnitude, trainable.adapters[path].magnitude[layer]
        )
    theirs, _ = torch_logits(base, tmp_path)
    spec = make_spec(
        model.apply, {"params": params}, found.rules(), TOKENS, method="lora"
    )
    pairs = found.start(jax.random.key(0), spec, params=params)
    close(our_logits(model, params, *pairs), theirs)
    ours = our_logits(model, params, trainable, directions)
    assert np.abs(theirs - ours).max() < np.abs(torch_logits(base)[0] - ours).max()


SETTINGS = {
    "everything": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora, some layers, ranks": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "rank_pattern": {"down_proj": 2},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_adapters_made_by_peft_start_ours(base, tmp_path, settings):
    theirs = peft_adapter(base, tmp_path, use_dora=True, **settings)
    model, params = our_model(base)
    found = from_peft(tmp_path, module_paths(params, "llama"))
    rules = found.rules(directions=3)
    assert all(rule.dora for rule in rules)
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method="tsd")
    trainable, directions = found.start(jax.random.key(0), spec, params=params)
    close(our_logits(model, params, trainable, directions), theirs)
    assert np.abs(torch_logits(base)[0] - theirs).max() > 0.1
    pretrained = our_logits(
        model, params, *init(jax.random.key(0), spec, params=params)
    )
    trainable, directions, _ = launch(params, trainable, spec)
    close(our_logits(model, params, trainable, directions), pretrained)


def test_a_plain_adapter_goes_on_with_dora(base, tmp_path):
    """Magnitudes start at the norms of what it makes of the kernels."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    theirs = peft_adapter(base, tmp_path, **settings)
    model, params = our_model(base)
    found = from_peft(tmp_path, module_paths(params, "llama"))
    spec = make_spec(model.apply, {"params": params}, DORA[:1], TOKENS, method="dash")
    trainable, directions = found.start(jax.random.key(0), spec, params=params)
    close(our_logits(model, params, trainable, directions), theirs)


def test_merged_checkpoints_and_saved_adapters_are_the_same_model(base, tmp_path):
    model, params = our_model(base)
    spec, trainable, directions = trained(model, params, get_method("tsd", keep=True))
    ours = our_logits(model, params, trainable, directions)
    to_merged(tmp_path / "merged", trainable, directions, module_name, base_folder=base)
    close(ours, torch_logits(tmp_path / "merged")[0])
    whole = merge(params, trainable, directions)
    close(np.asarray(model.apply({"params": whole}, TOKENS)), ours)
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, trainable, directions, spec, launched=True)
    untraced = tuple(dataclasses.replace(each, calls=()) for each in spec.kernels)
    assert load_adapter(file).spec == dataclasses.replace(spec, kernels=untraced)
    saved = load_adapter(file, spec)
    again = our_logits(model, params, saved.trainable, saved.directions)
    np.testing.assert_array_equal(again, ours)
