from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.oracle import core_directions, geometric, spectrum_kernel
from tests.helpers.trees import STACKED, small_spec, trained
from tsd_jax.core.adapter import delta, init, merge
from tsd_jax.core.dora import column_norms
from tsd_jax.core.errors import InputError
from tsd_jax.core.layout import Layout
from tsd_jax.core.quantization import Quantization, Quantized, dequantize, quantize
from tsd_jax.extraction.chunks import plan_chunks
from tsd_jax.extraction.launch import launch
from tsd_jax.extraction.settings import Extraction
from tsd_jax.training.sharding import make_mesh

SHAPE = (5, 16, 24)
# NormalFloat4, QLoRA (arXiv:2305.14314), appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


@functools.cache
def kernels() -> np.ndarray:
    stack = [spectrum_kernel(n, SHAPE[1:], geometric(16))[0] for n in range(SHAPE[0])]
    return np.asarray(stack, np.float32)


@functools.cache
def base(name: str, tile: int = 4) -> tuple[dict, dict]:
    """Return a quantized stack, and the same in floats."""
    how = Quantization(format=name, tile=tile)
    quantized = quantize({"k": jnp.asarray(kernels())}, how, "k")
    return quantized, {"k": jax.jit(dequantize)(quantized["k"])}


formats = pytest.mark.parametrize("name", ["int8", "nf4"])


def tiles(kernel: np.ndarray, size: int) -> np.ndarray:
    """Split the input axis: (..., tiles, size, out), float64."""
    *stack, fan_in, fan_out = kernel.shape
    return kernel.astype(np.float64).reshape(*stack, fan_in // size, size, fan_out)


@formats
@pytest.mark.parametrize("tile", [4, 16])
def test_every_number_is_the_nearest_of_its_tile(name, tile):
    quantized, plain = base(name, tile)
    split = tiles(kernels(), tile)
    most = np.abs(split).max(-2, keepdims=True)
    table = NF4 if name == "nf4" else np.arange(-128, 128) / 127.5
    least = np.abs(split[..., None] / most[..., None] - table).min(-1) * most
    error = np.abs(tiles(np.asarray(plain["k"]), tile) - split)
    np.testing.assert_allclose(error, least, rtol=1e-3, atol=1e-6)
    assert least.max() > 0.01
    leaf = quantized["k"]
    assert isinstance(leaf, Quantized)
    assert (leaf.shape, leaf.ndim, leaf.dtype) == (SHAPE, 3, jnp.float32)
    bits = {"int8": 8, "nf4": 4}[name]
    assert leaf.nbytes == 5 * 16 * 24 * bits // 8 + 4 * 5 * (16 // tile) * 24


def test_only_what_matches_is_quantized_and_shapes_serve_too():
    params = {
        "a": {"kernel": jnp.ones((64, 3)), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.ones((64, 2), jnp.bfloat16)},
    }
    found = quantize(params, "nf4", r".*/kernel")
    boxes = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Quantized))
    assert sum(isinstance(x, Quantized) for x in boxes) == 2
    assert found["a"]["bias"] is params["a"]["bias"]
    assert found["head"]["kernel"].dtype == jnp.bfloat16
    assert found["head"]["kernel"].unbox().dtype == jnp.bfloat16
    shapes = jax.eval_shape(lambda: params)
    abstract = quantize(shapes, "nf4", r".*/kernel")
    assert jax.eval_shape(lambda: found) == abstract
    assert abstract["a"]["kernel"].nbytes == 64 * 3 // 2 + 4 * 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda: Quantization(format="fp3"), "unknown quantization 'fp3'.*int8, nf4"),
        (lambda: Quantization(format="nf4", tile=-1), "tile of -1"),
        (lambda: Quantization(format="nf4", tile=6), "tile divisible by 4, not 6"),
        (
            lambda: quantize({"k": jnp.ones((6, 2))}, "nf4", "k"),
            "k: its input axis of 6 .* leave it out",
        ),
        (
            lambda: quantize({"k": jnp.ones((96, 2))}, "nf4", "k"),
            r"k: its input axis of 96 .*nf4 tile of 64; use a tile of 48",
        ),
        (lambda: quantize({"k": jnp.ones(64)}, "nf4", "k"), r"k of shape \(64,\)"),
        (lambda: quantize({"k": jnp.ones(64)}, "nf4", "x"), "'x' matches no parameter"),
    ],
)
def test_what_cannot_be_quantized_gets_one_line(how, message):
    with pytest.raises(InputError, match=message) as caught:
        how()
    assert "\n" not in str(caught.value)


def test_without_qwix_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(InputError, match="pip install qwix"):
        quantize({"k": jnp.ones((64, 2))}, "nf4", "k")


class Memory:
    """Keep spectra in a dict."""

    def __init__(self):
        self.kept = {}

    def load(self, key, size):
        del size
        return self.kept.get(key)

    def save(self, key, values, vectors):
        self.kept[key] = (np.array(values), np.array(vectors))


def assert_launched_alike(got, want):
    changes = [delta(side[0]["k"], side[1]["k"]) for side in (got, want)]
    np.testing.assert_allclose(*changes, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(got[2]["k"].indices, want[2]["k"].indices)
    np.testing.assert_allclose(got[2]["k"].sigma, want[2]["k"].sigma, rtol=1e-5)
    for name in ("left", "right"):
        x, y = (np.asarray(getattr(side[1]["k"], name)) for side in (got, want))
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@functools.cache
def launch_of(name: str):
    """Launch on the floats of a quantized base, all on one device."""
    spec = small_spec("tsd", shape=SHAPE, layout=STACKED, rank=3, directions=4)
    trainable = trained(0, spec)[0]
    return spec, trainable, launch(base(name)[1], trainable, spec)


WAYS = {
    "a store": (None, Extraction(store=Memory())),
    "matrices cut": (P(None, "fsdp", "tensor"), Extraction(memory_budget=1)),
    "inputs cut twice": (P(None, ("fsdp", "tensor")), Extraction(where="hosts")),
}


@pytest.mark.parametrize(
    "way",
    [
        "matrices cut",
        pytest.param("a store", marks=pytest.mark.slow),
        pytest.param("inputs cut twice", marks=pytest.mark.slow),
    ],
)
def test_launch_is_that_of_the_floats(way):
    name = "int8" if way == "inputs cut twice" else "nf4"
    spec, trainable, want = launch_of(name)
    params = base(name)[0]
    place, extraction = WAYS[way]
    if place is not None:
        mesh = make_mesh((2, 2, 2))
        params = jax.device_put(params, NamedSharding(mesh, place))
    assert_launched_alike(launch(params, trainable, spec, extraction=extraction), want)
    store = extraction.store
    if isinstance(store, Memory):
        # Named by the bits of the floats: those serve the same store.
        held = len(store.kept)
        assert held == SHAPE[0]
        launch(base(name)[1], trainable, spec, extraction=extraction)
        assert len(store.kept) == held


def test_launched_sets_are_those_of_a_full_svd():
    spec, trainable, (*_, report) = launch_of("nf4")
    floats = np.asarray(base("nf4")[1]["k"], np.float64)
    a, b = (
        np.asarray(x, np.float64)
        for x in (trainable.adapters["k"].a, trainable.adapters["k"].b)
    )
    for n in range(SHAPE[0]):
        want = core_directions(floats[n], spec.kernels[0].scale * a[n] @ b[n])
        found = np.asarray(report["k"].indices[n])
        np.testing.assert_array_equal(found, want.order[: len(found)])


@pytest.mark.slow
def test_one_matrix_alone_and_its_store():
    alone = {"k": jnp.asarray(kernels()[0])}
    how = Quantization(format="nf4", tile=4)
    params = quantize(alone, how, "k")
    spec = small_spec("dash", shape=SHAPE[1:], layout=Layout())
    trainable = trained(1, spec)[0]
    store = Memory()
    extraction = Extraction(store=store)
    got = launch(params, trainable, spec, extraction=extraction)
    plain = {"k": dequantize(params["k"])}
    assert_launched_alike(got, launch(plain, trainable, spec, extraction=extraction))
    assert len(store.kept) == 1


@pytest.mark.usefixtures("optimized")
def test_of_a_stack_a_chunk_alone_becomes_floats():
    leaf = base("int8")[0]["k"]
    plan = plan_chunks(leaf, STACKED, matrices_per_device=1)
    assert plan.width == 1
    take = jax.jit(lambda kernel, start: plan.matrices(kernel, start))
    text = take.lower(leaf, np.int32(0)).compile().as_text() or ""
    assert re.search(r"f32\[(1,)?16,24\]", text)
    assert not re.search(r"f32\[5,(16|4,4),24\]", text)


@pytest.mark.parametrize(
    "method", ["tsd", pytest.param("init", marks=pytest.mark.slow)]
)
def test_launch_leaves_the_function_while_a_requantized_residual_does_not(method):
    """PiSSA's way, Q(K - A B) + A B, against an untouched base and an offset."""
    quantized, plain = base("nf4")
    spec = small_spec(method, shape=SHAPE, layout=STACKED, rank=3, directions=4)
    trainable, directions, _ = launch(quantized, trained(0, spec)[0], spec)
    whole = np.asarray(plain["k"], np.float64)
    ours = np.asarray(merge(quantized, trainable, directions)["k"], np.float64)
    error = np.linalg.norm(ours - whole) / np.linalg.norm(whole)
    assert error < 1e-5
    scale = trainable.adapters["k"].kernel.scale
    taken = scale * np.asarray(
        trainable.adapters["k"].a @ trainable.adapters["k"].b, np.float64
    )
    how = Quantization(format="nf4", tile=4)
    rest = how.quantize(jnp.asarray(whole - taken, jnp.float32)).unbox()
    theirs = np.asarray(rest, np.float64) + taken
    other = np.linalg.norm(theirs - whole) / np.linalg.norm(whole)
    # Measured: ours 4e-10, theirs 1.3e-2.
    assert other > 1e-3
    assert other > 1e3 * error


def test_an_adapter_at_its_start_and_merging_leave_floats():
    quantized, plain = base("int8")
    spec = small_spec("tsd", shape=SHAPE, layout=STACKED)
    merged = merge(quantized, *init(jax.random.key(0), spec))
    np.testing.assert_array_equal(merged["k"], plain["k"])
    wide = merge(quantized, *init(jax.random.key(0), spec), dtype=jnp.bfloat16)
    assert wide["k"].dtype == jnp.bfloat16


def test_magnitudes_are_those_of_the_floats():
    """DoRA's norms, a layer at a time and of matrices seen at once."""
    quantized, plain = base("nf4")
    rng = np.random.default_rng(5)
    down, up = rng.normal(size=(5, 16, 2)), rng.normal(size=(5, 2, 24))
    floats = np.asarray(plain["k"], np.float64)
    want = np.linalg.norm(floats + down @ up, axis=-2)
    for lifted in ((0,), ()):
        layout = Layout((0,), (1,), (2,), lifted)
        factors = [jnp.asarray(x, jnp.float32) for x in (down, up)]
        found = column_norms(quantized["k"], *factors, layout=layout)
        np.testing.assert_allclose(found, want, rtol=1e-5)
