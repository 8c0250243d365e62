"""Every encoder without torch: goldens of transformers, adapters, shardings."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers.applied import check_gradients
from tests.helpers.encoders import PUBLISHED, inputs, write_encoder
from tests.helpers.trees import method_of, random_all
from tsd_jax import huggingface
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.adapter import merge
from tsd_jax.core.errors import InputError
from tsd_jax.core.spec import Rule
from tsd_jax.huggingface import names
from tsd_jax.huggingface.families.registry import FAMILIES
from tsd_jax.models.encoder import ENCODER_RULES

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "encoders.npz"
# The paper's modules for understanding: query, key, value, intermediate, output.
PROJECTIONS = (
    r"layers[^/]*/(attention/self/\w+|(attention/)?output/dense|intermediate/dense)"
    "/kernel"
)


def network(config, **settings):
    return FAMILIES[config.model_type].kind.network(config, **settings)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Config and parameters of a model, stacked or not."""

    @functools.cache
    def load(name, scan_layers=True):
        folder = tmp_path_factory.mktemp(name)
        write_encoder(folder, PUBLISHED[name])
        config = huggingface.read_config(folder)
        return config, huggingface.load_params(folder, config, scan_layers=scan_layers)

    return load


# Less time to compile; the ordinary programs are held against goldens.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, *arguments):
    return model.apply({"params": params}, *arguments)


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [*((name, True) for name in PUBLISHED), ("deberta-v2", False)],
)
def test_logits_are_those_of_transformers(loaded, name, scan_layers):
    config, params = loaded(name, scan_layers)
    tokens, mask, types = inputs(PUBLISHED[name])
    model = network(config, scan_layers=scan_layers)
    found = forward(model, params, tokens, None, mask, types)
    with np.load(GOLDENS) as goldens:
        expected = goldens[name]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_float32_and_layers_keep_their_type(loaded, name):
    """A scan refuses a block that changes the type of what it is given."""
    config, _ = loaded(name)
    half = huggingface.abstract_params(config, dtype=jnp.bfloat16)
    model = network(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    tokens, mask, _ = inputs(PUBLISHED[name])
    shape = jax.eval_shape(model.apply, {"params": half}, tokens, None, mask)
    assert (shape.shape, shape.dtype) == ((3, 3), jnp.float32)


def test_remat_changes_no_gradient_and_padding_makes_no_nan(loaded):
    config, params = loaded("deberta-v2")
    tokens, mask, _ = inputs(PUBLISHED["deberta-v2"])
    mask = mask.copy()
    mask[2] = False  # a row that fills up a batch

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def gradient(model, params):
        def total(params):
            return jnp.sum(model.apply({"params": params}, tokens, None, mask) ** 2)

        return jax.grad(total)(params)

    plain = gradient(network(config), params)
    again = gradient(network(config, remat=True), params)
    check_gradients(plain, again)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(
    ("name", "number"), [("bert", 6), ("roberta", 6), ("deberta-v3", 6)]
)
def test_every_projection_can_be_adapted(loaded, name, number, scan_layers):
    config, _ = loaded(name)
    shapes = huggingface.abstract_params(config, scan_layers=scan_layers)
    model = network(config, scan_layers=scan_layers)
    tokens = inputs(PUBLISHED[name])[0]
    rules = [Rule(pattern=PROJECTIONS, rank=2)]
    spec = make_spec(model.apply, {"params": shapes}, rules, tokens, method="tsd")
    kernels = {kernel.path: kernel for kernel in spec.kernels}
    assert len(kernels) == number * (1 if scan_layers else 3)
    for path, kernel in kernels.items():
        assert kernel.layout.batch == ((0,) if scan_layers else ())
        owners = names.tensor_names(path, kernel.shape, config.model_type)
        assert len({*owners}) == (3 if scan_layers else 1)
        assert all(".encoder.layer." in owner for owner in owners)


@pytest.mark.parametrize("name", ["roberta", "deberta-v3"])
def test_factored_is_merged(loaded, name):
    """Also where one kernel projects content and positions."""
    config, params = loaded(name)
    model = network(config)
    tokens = inputs(PUBLISHED[name])[0]
    rules = [Rule(pattern=PROJECTIONS, rank=2, directions=2)]
    method = method_of("tsd+keep")
    spec = make_spec(model.apply, {"params": params}, rules, tokens, method=method)
    pairs = random_all(0, spec, scale=0.1)
    apply = jax.jit(adapted(model.apply), compiler_options=QUICK)
    found = apply({"params": bind(params, *pairs)}, tokens)
    expected = apply({"params": merge(params, *pairs)}, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert np.abs(expected - apply({"params": params}, tokens)).max() > 0.1


def test_rules_shard_every_matrix_of_the_layers(loaded):
    for name in ("bert", "deberta-v2"):
        tree = names.flatten(loaded(name)[1])
        found = {
            path: next(spec for rule, spec in ENCODER_RULES if re.fullmatch(rule, path))
            for path in tree
        }
        layers = [path for path in tree if re.fullmatch(PROJECTIONS, path)]
        assert len(layers) == 6
        assert all({*found[path]} == {None, "fsdp", "tensor"} for path in layers)
        assert found["embeddings/word_embeddings/embedding"] == P("tensor", "fsdp")
        assert found["classifier/kernel"] == P()


@pytest.mark.parametrize(("name", "longest"), [("bert", 40), ("roberta", 38)])
def test_more_tokens_than_positions_are_refused(loaded, name, longest):
    config, params = loaded(name)
    assert config.longest == longest
    tokens = jax.ShapeDtypeStruct((1, longest + 1), jnp.int32)
    with pytest.raises(InputError, match=f"{longest + 1} tokens.*{longest}"):
        jax.eval_shape(network(config).apply, {"params": params}, tokens)
    within = jax.ShapeDtypeStruct((1, longest), jnp.int32)
    jax.eval_shape(network(config).apply, {"params": params}, within)


def test_a_deberta_has_no_longest_sequence(loaded):
    config, params = loaded("deberta-v3")
    assert config.longest is None
    tokens = jax.ShapeDtypeStruct((1, 99), jnp.int32)
    jax.eval_shape(network(config).apply, {"params": params}, tokens)
