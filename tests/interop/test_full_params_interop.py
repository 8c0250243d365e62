"""Parts trained whole: stock PEFT and transformers give our logits, and we give theirs.

Where the vocabulary has grown, the stock model is resized as PEFT's users do it.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.helpers.trees import filled
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.errors import InputError
from tsd_jax.core.full_params import Full
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule, Spec
from tsd_jax.huggingface import (
    grow,
    grown_config,
    load_params,
    module_paths,
    names,
    read_config,
    tensor_paths,
)
from tsd_jax.huggingface.merge import to_merged
from tsd_jax.huggingface.peft.files import read_files
from tsd_jax.huggingface.peft.full_params import full_of
from tsd_jax.huggingface.peft.read import from_peft
from tsd_jax.huggingface.peft.write import to_peft
from tsd_jax.models.decoder import Decoder

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

module_name = functools.partial(names.module_name, model_type="llama")

VOCABULARY, NEW = 64, 3
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(2, 12))
TOKENS[:, ::4] = VOCABULARY + np.arange(NEW)  # for models that have grown
KERNELS = Rule(pattern=r"layers/.*/(q|down)_proj/kernel", rank=4, directions=3)
NORMS = Full(pattern=r".*norm/scale")
TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"
ROWS = (VOCABULARY, VOCABULARY + NEW)


class Case(NamedTuple):
    """What trains whole, of which base."""

    tied: bool
    rules: tuple[Full, ...]
    grows: bool


CASES = {
    "norms": Case(False, (NORMS,), False),
    "head and table": Case(False, (Full(pattern=HEAD), Full(pattern=TABLE)), False),
    "table, tied": Case(True, (NORMS, Full(pattern=TABLE)), False),
    "rows": Case(
        False,
        (
            NORMS,
            Full(pattern=TABLE, rows=ROWS),
            Full(pattern=HEAD, rows=ROWS, axis=1),
        ),
        True,
    ),
    "rows, tied": Case(True, (Full(pattern=TABLE, rows=ROWS),), True),
    "grown table, tied": Case(True, (Full(pattern=TABLE),), True),
}
cases = pytest.mark.parametrize("name", CASES)


class Ours(NamedTuple):
    """Our model of a base, grown where the case grows."""

    model: Decoder
    params: Any
    spec: Spec


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, Path]:
    """Random Llamas, tied or not, written by transformers."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folders[tied])
    return folders


def ours(base: Path, rules: tuple, grows: bool, method: str = "dash") -> Ours:
    config = read_config(base)
    params = load_params(base, config)
    if grows:
        config, params = grown_config(config, ROWS), grow(params, ROWS)
    model = Decoder(config)
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method=method)
    return Ours(model, params, spec)


def tokens(grows: bool) -> np.ndarray:
    return TOKENS if grows else TOKENS % VOCABULARY


def trained(our: Ours, seed: int = 1):
    """Move every leaf, frozen directions too, by random numbers."""
    trees = init(jax.random.key(0), our.spec, params=our.params)
    moves = filled(seed, jax.eval_shape(lambda: trees), 0.2)
    return jax.tree.map(jnp.add, trees, moves)


def our_logits(our: Ours, trees: Any, grows: bool) -> np.ndarray:
    variables = {"params": bind(our.params, *trees)}
    return np.asarray(adapted(our.model.apply)(variables, tokens(grows)))


def stock(base: Path, grows: bool = False):
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grows:
        model.resize_token_embeddings(VOCABULARY + NEW)
    return model.eval()


def logits_of(model, grows: bool) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens(grows))).logits.numpy()


@cases
def test_stock_peft_gives_our_logits(bases, tmp_path, name):
    tied, rules, grows = CASES[name]
    our = ours(bases[tied], (KERNELS, *rules), grows)
    trees = trained(our)
    to_peft(
        tmp_path,
        *trees,
        module_name,
        base_model=str(bases[tied]),
        params=our.params,
    )
    base = stock(bases[tied], grows)
    before = logits_of(base, grows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or unexpected key is a warning there
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    theirs = logits_of(model, grows)
    np.testing.assert_allclose(our_logits(our, trees, grows), theirs, atol=3e-4)
    # Not by the adapters of kernels alone.
    kernels = trees[0].replace(full={}), trees[1]
    assert np.abs(our_logits(our, kernels, grows) - theirs).max() > 0.5
    assert np.abs(before - theirs).max() > 1


@cases
def test_a_merged_checkpoint_gives_our_logits(bases, tmp_path, name):
    tied, rules, grows = CASES[name]
    our = ours(bases[tied], (KERNELS, *rules), grows)
    trees = trained(our)
    out = tmp_path / "merged"
    written = to_merged(out, *trees, module_name, base_folder=bases[tied])
    assert written.error < 1e-6
    model = stock(out)
    assert model.config.vocab_size == VOCABULARY + NEW * grows
    assert model.config.tie_word_embeddings == tied
    np.testing.assert_allclose(
        our_logits(our, trees, grows), logits_of(model, grows), atol=3e-4
    )


@cases
def test_our_own_adapter_is_read_back(bases, tmp_path, name):
    tied, rules, grows = CASES[name]
    our = ours(bases[tied], (KERNELS, *rules), grows)
    trees = trained(our)
    base = str(bases[tied])
    to_peft(tmp_path, *trees, module_name, base_model=base, params=our.params)
    places = module_paths(our.params, "llama"), tensor_paths(our.params, "llama")
    found = from_peft(tmp_path, *places)
    again = ours(bases[tied], found.rules(directions=2), grows)
    assert again.spec.full == our.spec.full
    back = found.start(jax.random.key(0), again.spec, params=our.params)
    for path, part in trees[0].full.items():
        np.testing.assert_array_equal(back[0].full[path].value, part.value)
    np.testing.assert_allclose(
        our_logits(again, back, grows), our_logits(our, trees, grows), atol=3e-4
    )


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"modules_to_save": ["lm_head", "model.norm"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (False, {"trainable_token_indices": [3, 5, 66]}),
        (True, {"trainable_token_indices": {"embed_tokens": [64, 65, 66]}}),
        (
            False,
            {"trainable_token_indices": {"embed_tokens": [65], "lm_head": [64, 66]}},
        ),
    ],
    ids=["modules", "tied module", "rows", "tied rows", "rows of both"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*resized during finetuning")
def test_an_adapter_of_stock_peft_gives_its_logits(bases, tmp_path, tied, settings):
    """And what it trains whole is what ours trains."""
    grows = "trainable_token_indices" in settings
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
    )
    torch.manual_seed(1)
    # The same new rows on both sides: a checkpoint of the grown base.
    grown = tmp_path / "grown"
    stock(bases[tied], grows).save_pretrained(grown)
    model = peft.get_peft_model(stock(grown), config).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if leaf.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                leaf.add_(0.2 * torch.randn(leaf.shape, generator=generator))
    theirs = logits_of(model, grows)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert np.abs(theirs - logits_of(stock(grown), grows)).max() > 1
    config = read_config(grown)
    params, decoder = load_params(grown, config), Decoder(config)
    places = module_paths(params, "llama"), tensor_paths(params, "llama")
    found = from_peft(tmp_path / "adapter", *places)
    spec = make_spec(
        decoder.apply, {"params": params}, found.rules(), TOKENS, method="tsd"
    )
    trees = found.start(jax.random.key(0), spec, params=params)
    got = our_logits(Ours(decoder, params, spec), trees, grows)
    np.testing.assert_allclose(got, theirs, atol=3e-4)
    with pytest.raises(InputError, match="in full: give tensor_paths"):
        from_peft(tmp_path / "adapter", places[0])
    assert full_of(read_files(tmp_path / "adapter")).keys() <= places[1].keys()
