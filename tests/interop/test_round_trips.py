"""Every family goes out to PEFT and transformers, and comes back in, as it is."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compiled import QUICK
from tests.helpers.decoders import PUBLISHED, inputs, write_decoder
from tests.helpers.trees import filled, without_gains
from tsd_jax import huggingface
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from tests.helpers.stock import torch_logits

TOLERANCE = 2e-4
TOKENS, _, _ = inputs(12)
# Ranks differ; of the experts, one matrix alone; routers train as well.
ATTENTION = Rule(
    pattern=r"layers/self_attn/.*_proj/kernel", rank=2, alpha=3, directions=3
)
DENSE = Rule(
    pattern=r"layers/mlp/(shared_expert/)?\w+_proj/kernel", rank=1, directions=2
)
EXPERTS = Rule(
    pattern=r"layers/mlp/(experts/.*|gate/kernel)", rank=3, alpha=4, directions=1
)
DOWN_ALONE = Rule(pattern=r"layers/mlp/experts/down_proj/kernel", rank=1, directions=2)
RULES = dict.fromkeys(PUBLISHED, (ATTENTION, DENSE)) | {
    "mixtral": (ATTENTION, EXPERTS),
    "qwen3_moe": (ATTENTION, DOWN_ALONE),
    "qwen2_moe": (ATTENTION, DENSE, EXPERTS),
}
RUNS = [*((family, "tsd") for family in PUBLISHED), ("llama", "dash")]
# What somebody trained elsewhere: modules by name, parameters of experts.
LINEAR = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "qkv_proj"]
STACKED = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
PATTERNS = {
    "rank_pattern": {r".*layers\.1\.self_attn\.o_proj": 4, "down_proj": 1},
    "alpha_pattern": {"o_proj": 7},
}


def stock(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


def with_peft(base, adapter):
    """Load an adapter as anybody would, but let a key that does not fit be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of its own renaming
        # PEFT looks for what the patterns name among modules, not parameters.
        warnings.filterwarnings("ignore", r".*_pattern keys .*gate_up_proj")
        return peft.PeftModel.from_pretrained(stock(base), adapter).eval()


@pytest.fixture
def base(tmp_path, family):
    folder = tmp_path / "base"
    folder.mkdir()
    write_decoder(folder, PUBLISHED[family])
    return folder


def our_model(base):
    config = huggingface.read_config(base)
    return Decoder(config), huggingface.load_params(base, config)


def our_logits(model, params, trainable, directions):
    variables = {"params": bind(params, trainable, directions)}
    apply = jax.jit(adapted(model.apply), compiler_options=QUICK)
    return np.asarray(apply(variables, TOKENS))


def launched(model, params, rules, method):
    """Adapters as after a run: random A and B, launch, and random steps after it."""
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method=method)
    trainable, _ = init(jax.random.key(0), spec)
    trainable, directions, _ = launch(
        params, without_gains(filled(1, trainable, 0.2)), spec
    )
    moved = filled(2, trainable, 0.1)
    return jax.tree.map(jnp.add, trainable, moved), directions


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_what_goes_out_is_what_we_compute(tmp_path, base, family, method):
    model, params = our_model(base)
    pairs = launched(model, params, RULES[family], method)
    ours = our_logits(model, params, *pairs)
    assert np.abs(ours - torch_logits(stock(base), TOKENS)).max() > 0.3

    name = functools.partial(huggingface.module_name, model_type=family)
    to_peft(tmp_path / "peft", *pairs, name, base_model=str(base), params=params)
    theirs = torch_logits(with_peft(base, tmp_path / "peft"), TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)

    to_merged(tmp_path / "merged", *pairs, name, base_folder=base)
    theirs = torch_logits(stock(tmp_path / "merged"), TOKENS)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)

    # What we wrote for PEFT, we read ourselves.
    found = from_peft(tmp_path / "peft", huggingface.module_paths(params, family))
    variables = {"params": params}
    spec = make_spec(
        model.apply, variables, found.rules(directions=1), TOKENS, method="lora"
    )
    again = our_logits(model, params, *found.start(jax.random.key(0), spec))
    np.testing.assert_allclose(again, ours, atol=TOLERANCE, rtol=0)


def random_peft(base, folder, *, rslora, **targets):
    """Let PEFT make an adapter of random numbers, and give the logits it loads to."""
    settings = peft.LoraConfig(
        r=2, lora_alpha=3, use_rslora=rslora, **targets, **PATTERNS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that only some families have
        model = peft.get_peft_model(stock(base), settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(stock(base), folder).eval()
    return torch_logits(loaded, TOKENS)


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_peft_made_comes_in(tmp_path, base, family):
    model, params = our_model(base)
    stacked = {} if model.config.experts is None else {"target_parameters": STACKED}
    theirs = random_peft(
        base,
        tmp_path / "peft",
        rslora=family in ("gemma2", "qwen3", "qwen2_moe"),
        target_modules=[*LINEAR[: 3 if family in ("mixtral", "qwen3_moe") else None]],
        **stacked,
    )
    assert np.abs(theirs - torch_logits(stock(base), TOKENS)).max() > 0.3
    found = from_peft(tmp_path / "peft", huggingface.module_paths(params, family))
    assert any("mlp/experts/up" in path for path in found.kernels) == bool(stacked)
    variables = {"params": params}
    spec = make_spec(
        model.apply, variables, found.rules(directions=3), TOKENS, method="tsd"
    )
    ours = our_logits(model, params, *found.start(jax.random.key(0), spec))
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
