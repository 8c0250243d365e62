"""Every family without torch: goldens of transformers, decoding, and adapters."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.applied import check_gradients, decode, forward
from tests.helpers.decoders import GOLDEN_COLUMNS, PUBLISHED, inputs, write_decoder
from tests.helpers.trees import method_of, random_all
from tsd_jax import huggingface
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import Trainable, merge
from tsd_jax.core.initialization import init
from tsd_jax.core.spec import Rule
from tsd_jax.extraction.launch import launch
from tsd_jax.huggingface import names
from tsd_jax.models.decoder import Decoder

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "decoders.npz"
TOKENS, MASK, POSITIONS = inputs()
PROJECTIONS = r"layers.*_proj/kernel"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Config and parameters of a family, stacked or not."""

    @functools.cache
    def load(family: str, scan_layers: bool = True):
        folder = tmp_path_factory.mktemp(family)
        write_decoder(folder, PUBLISHED[family])
        config = huggingface.read_config(folder)
        return config, huggingface.load_params(folder, config, scan_layers=scan_layers)

    return load


# Without the scan where layers are not all alike, or are stacked a second time.
LOOPED = ("gemma3_text", "smollm3", "qwen3_moe")


@pytest.mark.parametrize(
    ("family", "scan_layers"),
    [*((family, True) for family in PUBLISHED), *((name, False) for name in LOOPED)],
)
def test_logits_are_those_of_transformers(loaded, family, scan_layers):
    config, params = loaded(family, scan_layers)
    model = Decoder(config, scan_layers=scan_layers)
    logits = forward(model, params, TOKENS, POSITIONS, MASK)
    with np.load(GOLDENS) as goldens:
        expected = goldens[family]
    found = np.asarray(logits)[:, GOLDEN_COLUMNS]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_stream_keeps_its_type_and_logits_are_float32(loaded, family):
    """A scan refuses a block that changes the type of what it is given."""
    config, _ = loaded(family)
    half = huggingface.abstract_params(config, dtype=jnp.bfloat16)
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shape = jax.eval_shape(model.apply, {"params": half}, TOKENS, POSITIONS, MASK)
    assert (shape.shape, shape.dtype) == ((3, 24, 67), jnp.float32)


@pytest.mark.parametrize("family", PUBLISHED)
def test_decoding_is_the_full_forward(loaded, family):
    config, params = loaded(family)
    model = Decoder(config)
    full = forward(model, params, TOKENS, POSITIONS, MASK)
    room = np.zeros((3, 27), int)
    _, cache = jax.eval_shape(
        functools.partial(model.apply, decode=True, mutable="cache"),
        {"params": params},
        room,
    )
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
    found, start = [], 0
    for size in (12, 3, 3, 3, 3):
        part = np.s_[:, start : start + size]
        given = (TOKENS[part], POSITIONS[part], MASK[part])
        logits, cache = decode(model, params, cache, *given)
        found.append(logits)
        start += size
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found[MASK], full[MASK], atol=1e-5, rtol=1e-5)
    assert jnp.isfinite(found).all()


def test_a_window_no_narrower_than_the_tokens_is_none(loaded):
    config, params = loaded("mistral")
    wide = dataclasses.replace(config, sliding_window=24)
    none = dataclasses.replace(config, sliding_window=None)
    near = dataclasses.replace(config, sliding_window=23)
    logits = [forward(Decoder(each), params, TOKENS) for each in (none, wide, near)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2])[:, :23].max() == pytest.approx(0, abs=1e-5)
    assert np.abs(logits[0] - logits[2])[:, 23].max() > 1e-2


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe"])
def test_remat_changes_no_gradient_and_padding_makes_no_nan(loaded, family):
    config, params = loaded(family)
    mask = MASK.copy()
    mask[2] = False

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(model, params):
        def total(params):
            logits = model.apply({"params": params}, TOKENS, None, mask)
            return jnp.sum(jnp.square(logits))

        return jax.grad(total)(params)

    plain = gradient(Decoder(config), params)
    again = gradient(Decoder(config, remat=True), params)
    check_gradients(plain, again)


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_projection_can_be_adapted(family, scan_layers, tmp_path):
    write_decoder(tmp_path, PUBLISHED[family])
    config = huggingface.read_config(tmp_path)
    shapes = huggingface.abstract_params(config, scan_layers=scan_layers)
    model = Decoder(config, scan_layers=scan_layers)
    rules = [Rule(pattern=PROJECTIONS, rank=2)]
    spec = make_spec(model.apply, {"params": shapes}, rules, TOKENS, method="tsd")
    kernels = {kernel.path: kernel for kernel in spec.kernels}
    number = {"phi3": 4, "qwen2_moe": 10}.get(family, 7)
    assert len(kernels) == number * (1 if scan_layers else 4)
    for path, kernel in kernels.items():
        stacked = [scan_layers, "/experts/" in path].count(True)
        assert kernel.layout.batch == tuple(range(stacked))
        assert kernel.layout.lifted == kernel.layout.batch
        assert kernel.layout.inputs == (stacked,)
        # Each is one torch module, or one for each layer and expert.
        owners = names.tensor_names(path, kernel.shape, config.model_type)
        assert len({*owners}) == np.prod(kernel.shape[:stacked], dtype=int)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phi3", "gemma2"])
def test_factored_is_merged(loaded, family):
    config, params = loaded(family)
    model = Decoder(config)
    rules = [Rule(pattern=PROJECTIONS, rank=2, directions=2)]
    method = method_of("tsd+keep")
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method=method)
    pairs = random_all(0, spec, scale=0.1)
    found = jax.jit(adapted(model.apply))({"params": bind(params, *pairs)}, TOKENS)
    expected = forward(model, merge(params, *pairs), TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert np.abs(expected - forward(model, params, TOKENS)).max() > 0.1


def test_experts_are_launched_each_on_its_own(loaded):
    config, params = loaded("mixtral")
    model = Decoder(config)
    path = "layers/mlp/experts/up_proj/kernel"
    rules = [Rule(pattern=path, rank=2, directions=3)]
    spec = make_spec(model.apply, {"params": params}, rules, TOKENS, method="tsd")
    trainable, _ = init(jax.random.key(0), spec)
    rng = np.random.default_rng(0)
    adapters = {
        path: each.replace(b=jnp.asarray(rng.normal(size=each.b.shape), jnp.float32))
        for path, each in trainable.adapters.items()
    }
    trainable = Trainable(adapters=adapters)
    trainable, directions, _ = launch(params, trainable, spec)
    kernel = params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert trainable.adapters[path].a.shape == (4, 5, 32, 2)
    after = merge(params, trainable, directions)
    moved = after["layers"]["mlp"]["experts"]["up_proj"]["kernel"] - kernel
    assert jnp.abs(moved).max() < 1e-4  # the pretrained function, to rounding
    # The directions of one expert are singular vectors of its own matrix.
    left = np.asarray(directions[path].left)[2, 3]
    right = np.asarray(directions[path].right)[2, 3]
    sigma = np.diag(left.T @ np.asarray(kernel)[2, 3] @ right)
    spectrum = np.linalg.svd(np.asarray(kernel)[2, 3], compute_uv=False)
    assert np.abs(spectrum[:, None] - sigma).min(axis=0).max() < 1e-4
