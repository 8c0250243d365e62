"""Stock PEFT on the stock transformers model gives our logits, for every method."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.helpers.trees import without_gains
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Trainable
from tsd_jax.core.errors import InputError
from tsd_jax.core.initialization import init
from tsd_jax.core.methods import get_method
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch
from tsd_jax.huggingface import (
    load_params,
    module_paths,
    names,
    read_config,
)
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

module_name = functools.partial(names.module_name, model_type="llama")

TOKENS = np.random.default_rng(0).integers(64, size=(2, 12))
ALL = (Rule(pattern=r"layers/.*/\w+_proj/kernel", rank=4, alpha=8, directions=3),)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with grouped heads, written by transformers."""
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
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def torch_logits(base, adapter=None):
    """Logits of the stock model, and the names of the modules PEFT adapted."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with warnings.catch_warnings():
            # A missing or an unexpected key is only a UserWarning there.
            warnings.simplefilter("error")
            # The two libraries' own quarrel about renamed attributes.
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS)).logits.numpy()
    adapted_modules = [
        n for n, _ in model.named_modules() if n.endswith("lora_A.default")
    ]
    return logits, len(adapted_modules)


def randomised(tree, seed):
    """Put values of a trained size into every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    values = [jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, values)


def our_model(base, *, scan_layers=True):
    config = read_config(base)
    params = load_params(base, config, scan_layers=scan_layers)
    return Decoder(config, scan_layers=scan_layers), params


def trained(model, params, rules, method):
    """Adapters as after a run: random A and B, launch, random A, B and gains."""
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method=method)
    trainable, directions = init(jax.random.key(0), spec)
    trainable = randomised(trainable, 1)
    if spec.method.launches:
        trainable = without_gains(trainable)
        trainable, directions, _ = launch(params, trainable, spec)
        moved = randomised(trainable, 2)
        trainable = jax.tree.map(lambda x, y: x + y, trainable, moved)
    return trainable, directions


def our_logits(model, params, trainable, directions):
    variables = {"params": bind(params, trainable, directions)}
    return np.asarray(adapted(model.apply)(variables, TOKENS))


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        (get_method("lora"), 4),
        (get_method("dash"), 4 + 3),
        (get_method("init"), 4 + 4),
        (get_method("tsd"), 4 + 4),
        (get_method("init", keep=True), 4 + 4 + 4),
        (get_method("tsd", keep=True), 4 + 4 + 4),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_logits_are_ours(base, tmp_path, method, rank):
    model, params = our_model(base)
    trainable, directions = trained(model, params, ALL, method)
    written = to_peft(
        tmp_path,
        trainable,
        directions,
        module_name,
        base_model=str(base),
        params=params,
    )
    assert written.rank == rank
    ours = our_logits(model, params, trainable, directions)
    theirs, modules = torch_logits(base, tmp_path)
    assert modules == 3 * 7
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    # The adapter is no small change: without it the logits are far off.
    assert np.abs(torch_logits(base)[0] - theirs).max() > 1


def test_only_what_was_adapted_is_adapted_there(base, tmp_path):
    """Other ranks for other modules, one layer of three, modules named in full."""
    model, params = our_model(base, scan_layers=False)
    rules = (
        Rule(
            pattern=r"layers_1/self_attn/[qv]_proj/kernel",
            rank=2,
            alpha=3,
            directions=5,
        ),
        Rule(pattern=r"layers_(1|2)/mlp/up_proj/kernel", rank=6, alpha=6, directions=1),
        Rule(
            pattern=r"lm_head/kernel", rank=1, alpha=1, directions=1, scaling="rslora"
        ),
    )
    trainable, directions = trained(model, params, rules, "tsd")
    to_peft(
        tmp_path,
        trainable,
        directions,
        module_name,
        base_model=str(base),
        params=params,
    )
    theirs, modules = torch_logits(base, tmp_path)
    assert modules == 5
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)


def test_full_names_serve_as_well_as_short_ones(base, tmp_path):
    model, params = our_model(base)
    trainable, directions = trained(model, params, ALL, "tsd")
    to_peft(tmp_path, trainable, directions, module_name, base_model=str(base))
    theirs, modules = torch_logits(base, tmp_path)
    assert modules == 3 * 7
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)


def test_an_adapter_before_launch_is_a_plain_lora(base, tmp_path):
    model, params = our_model(base)
    spec = make_spec(model.apply, {"params": params}, ALL, TOKENS, method="tsd")
    trainable, directions = init(jax.random.key(0), spec)
    adapters = {
        path: adapter.replace(b=randomised(adapter.b, n))
        for n, (path, adapter) in enumerate(trainable.adapters.items())
    }
    trainable = Trainable(adapters=adapters)
    export = to_peft(tmp_path, trainable, directions, module_name, base_model=str(base))
    assert export.rank == 4
    theirs, _ = torch_logits(base, tmp_path)
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)


def test_a_compressed_adapter_loads_and_loses_what_it_says(base, tmp_path):
    model, params = our_model(base)
    trainable, directions = trained(model, params, ALL, "tsd")
    saved = (trainable, directions, module_name)
    export = to_peft(tmp_path, *saved, base_model=str(base), params=params, max_rank=5)
    assert export.rank == 5
    assert len(export.errors) == 3 * 7
    assert 0.01 < export.error < 0.9
    ours = our_logits(model, params, trainable, directions)
    plain, _ = torch_logits(base)
    theirs, modules = torch_logits(base, tmp_path)
    assert modules == 3 * 7
    assert np.abs(theirs - ours).max() < np.abs(plain - ours).max()
    # At the rank it has anyway nothing is lost.
    full = tmp_path / "full"
    export = to_peft(full, *saved, base_model=str(base), params=params, max_rank=8)
    assert (export.rank, export.error) == (8, 0.0)
    np.testing.assert_allclose(torch_logits(base, full)[0], ours, atol=2e-4, rtol=0)


def peft_adapter(base, folder, **settings):
    """Let PEFT make an adapter, every factor random, and give the logits it loads to.

    Not those it had: saving sorts patterns by name, and the first that fits counts.
    """
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank_pattern beside rsLoRA, when converting
        model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return torch_logits(base, folder)[0]


THEIRS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora_and_patterns": {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": r".*\.(self_attn\.[qkvo]_proj|up_proj)",
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6, "up_proj": 2},
        "alpha_pattern": {"k_proj": 9, r"^model\.layers\.0\..*": 2},
    },
    "some_layers": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "lm_head"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "gaussian": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "init_lora_weights": "gaussian",
    },
}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS.keys())
def test_adapters_made_by_peft_start_ours(base, tmp_path, settings, scan_layers):
    theirs = peft_adapter(base, tmp_path, **settings)
    model, params = our_model(base, scan_layers=scan_layers)
    found = from_peft(tmp_path, module_paths(params, "llama"))
    assert found.base_model == str(base)
    spec = make_spec(
        model.apply,
        {"params": params},
        found.rules(directions=3),
        TOKENS,
        method="tsd",
    )
    trainable, directions = found.start(jax.random.key(0), spec)
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    assert np.abs(torch_logits(base)[0] - theirs).max() > 0.1
    # From here on it is an adapter like any other.
    trainable, directions, _ = launch(params, trainable, spec)
    assert np.isfinite(our_logits(model, params, trainable, directions)).all()


@pytest.mark.filterwarnings("ignore:`is_gradient:FutureWarning")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_on_a_changed_base_are_refused_until_converted(base, tmp_path, start):
    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": start}
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    first, plain, converted = (tmp_path / n for n in ("first", "plain", "converted"))
    model.save_pretrained(first)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        theirs = model(torch.from_numpy(TOKENS)).logits.numpy()
    model.save_pretrained(plain)
    ours, params = our_model(base)
    with pytest.raises(InputError, match="path_initial_model_for_weight_conversion"):
        from_peft(plain, module_paths(params, "llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of what it undoes
        model.save_pretrained(
            converted, path_initial_model_for_weight_conversion=str(first)
        )
    found = from_peft(converted, module_paths(params, "llama"))
    variables = {"params": params}
    spec = make_spec(ours.apply, variables, found.rules(), TOKENS, method="lora")
    trainable, directions = found.start(jax.random.key(0), spec)
    logits = our_logits(ours, params, trainable, directions)
    np.testing.assert_allclose(logits, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1MB", "20KB"])
def test_a_merged_checkpoint_is_the_adapted_model(tmp_path, shard, tied):
    folder, merged = tmp_path / "base", tmp_path / "merged"
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    stock = transformers.LlamaForCausalLM(config)
    stock.save_pretrained(folder, max_shard_size=shard)
    model, params = our_model(folder)
    trainable, directions = trained(model, params, ALL, "tsd")
    to_merged(merged, trainable, directions, module_name, base_folder=folder)
    assert len(list(merged.glob("*.safetensors"))) == len(
        list(folder.glob("*.safetensors"))
    )
    assert (len(list(merged.glob("*.safetensors"))) > 2) == (shard == "20KB")
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        merged, output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, _ = torch_logits(merged)
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    assert np.abs(torch_logits(folder)[0] - theirs).max() > 1


def test_a_bfloat16_base_is_merged_exactly_into_float32(base, tmp_path):
    stock = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    stock.save_pretrained(tmp_path / "base")
    model, params = our_model(tmp_path / "base")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    trainable, directions = trained(model, params, ALL, "dash")
    where = {"base_folder": tmp_path / "base"}
    tree = (trainable, directions, module_name)
    wide = to_merged(tmp_path / "wide", *tree, **where, dtype="float32")
    narrow = to_merged(tmp_path / "narrow", *tree, **where)
    assert wide.error == 0 < 1e-4 < narrow.error
    theirs, _ = torch_logits(tmp_path / "wide")
    ours = our_logits(model, params, trainable, directions)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=0)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "narrow")
    assert again.dtype == torch.bfloat16
