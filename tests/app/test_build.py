"""What a run is made of, and what is refused before it starts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import default
from tests.helpers.decoders import PUBLISHED, write_decoder
from tests.helpers.demo_runs import ASSETS, assert_refused, small_settings
from tsd_jax.app.build import adapted_spec, batch_source, prepare
from tsd_jax.app.data import read_files
from tsd_jax.app.model import open_model
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.training.sharding import make_mesh

BAD = {
    "model__path": ("no/such/folder", r"model folder no/such/folder does not exist"),
    "adapter__pattern": ("nothing.*", r"rule 'nothing\.\*' matches no parameter"),
    "adapter__full_params": ("norm", r"rule 'norm' matches no parameter; the nearest"),
    "model__added_tokens": (("<a>", "<a>"), r"already has token '<a>'"),
    "adapter__rank": (97, r"rank 97 is larger .* at most 96"),
    "adapter__directions": (100, r"directions 100 is larger"),
    "method__launch_step": (6, r"launch_step 6 must lie in \[0, steps\)"),
    "train__micro_batches": (4, r"micro-batch of 2 examples does not divide"),
    "optimizer__decay": ("step", r"unknown decay 'step'"),
    "optimizer__warmup": (6, r"warmup 6 must be in"),
    "data__kind": ("csv", r"unknown data.kind 'csv'"),
    "data__path": ("no.json", r"data file no.json does not exist"),
    "data__template": ("chat", r"unknown data.template 'chat'"),
    "data__length": (3, r"nothing to train on"),
    "eval__metric": ("bleu", r"unknown eval.metric 'bleu'"),
    "eval__batch_size": (3, r"does not divide"),
    "mesh": ((3, 1, 1), r"mesh \(3, 1, 1\) needs 3 devices, but there are 8"),
}

BAD_TOGETHER = {
    "directions that do not train": (
        {"method__name": "init", "adapter__auto_directions": True},
        r"auto_directions=True has no meaning for method 'init'",
    ),
    "a tile that divides nothing": (
        {"model__quantization": "nf4", "model__remat": True},
        r"layers/.*/kernel: its input axis of 96 .* tile of 64; use a tile of 48",
    ),
    "no room to restart": (
        {"optimizer__restart": True, "optimizer__warmup": 4},
        r"warmup 4 must be in \[0, steps\), steps are 4",
    ),
    "a launch on nothing": (
        {"method__launch_step": 1, "optimizer__warmup": 3},
        r"until the launch after step 1 the learning rate is 0: launch later",
    ),
    "no learning before launch": (
        {"optimizer__learning_rate": 0.0},
        r"until the launch after step 2 the learning rate is 0: launch later",
    ),
    "in full and adapted": (
        {"adapter__full_params": "layers/self_attn/q_proj/kernel"},
        r"matches only what earlier rules took",
    ),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_value_gets_one_line_before_anything_starts(key):
    value, message = BAD[key]
    assert_refused(prepare, {key: value}, message)


@pytest.mark.parametrize("case", BAD_TOGETHER)
def test_settings_that_do_not_go_together_get_one_line(case):
    assert_refused(prepare, *BAD_TOGETHER[case])


def test_variants_reach_the_method_and_the_schedule():
    settings = small_settings(
        method__ranking="smallest", method__start="zero", method__launch_step=0
    )
    prepared = prepare(settings)
    want = get_method("tsd", ranking="smallest", start="zero")
    assert prepared.spec.method == want
    assert prepared.plan.launch_step == 0
    settings = small_settings(optimizer__restart=True, optimizer__decay="linear")
    rates = prepare(settings).rates
    peaks = {"learning_rate": 5e-3, "gain_learning_rate": 5e-3}
    for name, peak in peaks.items():
        got = [np.asarray(rates[name](step)) for step in range(6)]
        want = np.array([1, 5 / 6, 1, 3 / 4, 2 / 4, 1 / 4])
        np.testing.assert_allclose(got, peak * want, rtol=1e-6)


def spec_of(settings):
    files = read_files(settings.data, settings.seed)
    return adapted_spec(settings, open_model(settings.model, files))


def test_experts_are_left_out_unless_asked_for(tmp_path):
    for path in (ASSETS / "model").glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_decoder(tmp_path, PUBLISHED["mixtral"])
    everything, default_rule = r"layers.*_proj/kernel", default.get_config().adapter

    def kernels(scan_layers, pattern):
        settings = small_settings(
            model__path=str(tmp_path),
            model__scan_layers=scan_layers,
            adapter__pattern=pattern,
        )
        return spec_of(settings).kernels

    assert len(kernels(True, everything)) == 7
    assert len(kernels(True, default_rule.pattern)) == 3
    assert len(kernels(False, everything)) == 4 * 7


def test_rows_of_added_tokens_train_unless_all_of_them_do():
    settings = small_settings(model__added_tokens=("<a>",))
    (rows,) = spec_of(settings).full
    assert (rows.path, rows.rows) == ("embed_tokens/embedding", (1179, 1180))
    every = small_settings(
        model__added_tokens=("<a>",), adapter__full_params="embed_tokens/embedding"
    )
    (table,) = spec_of(every).full
    assert (table.path, table.rows) == ("embed_tokens/embedding", None)


def test_a_batch_is_cut_into_micro_batches_in_order():
    settings = small_settings(mesh=(8, 1, 1))
    files = read_files(settings.data, settings.seed)
    base = open_model(settings.model, files)
    data = files.encode(base.tokenizer, None)
    train = dataclasses.replace(settings.train, batch_size=16, micro_batches=2)
    batch = batch_source(train, data, make_mesh((8, 1, 1)))(3)
    want = data.rows(16).batch(3)
    assert batch.keys() == want.keys()
    for name, array in batch.items():
        assert array.shape == (2, 8, settings.data.length)
        np.testing.assert_array_equal(np.concatenate(np.asarray(array)), want[name])


def test_headers_are_looked_at_before_anything_runs(tmp_path):
    write_decoder(tmp_path, PUBLISHED["llama"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    settings = small_settings(model__path=str(tmp_path))
    files = read_files(settings.data, settings.seed)
    with pytest.raises(InputError, match=r"lacks tensor 'model\.norm\.weight'"):
        open_model(settings.model, files)


def test_a_length_beyond_the_positions_is_told():
    """The demo's model was trained on 128."""
    told = [prepare(small_settings(data__length=n)).notes[-1] for n in (128, 129)]
    assert "positions" not in told[0]
    assert told[1].startswith("warning: data.length 129 is beyond the 128 positions")
