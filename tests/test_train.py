from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tsd_jax as tsd
from configs import default, demo, llama_tsd, stories_tsd
from tests.helpers.decoders import PUBLISHED, write_decoder
from tests.helpers.program import ROOT, train
from tsd_jax.app.export import main
from tsd_jax.app.run import execute
from tsd_jax.app.task import DataSettings
from tsd_jax.core.errors import InputError
from tsd_jax.core.methods import get_method
from tsd_jax.huggingface import load_tokenizer
from tsd_jax.training.loop import StopRequested


def small_config(**changes):
    """Return the demo's config, cut to 6 steps on few kernels, with changes by key."""
    config = demo.get_config()
    config.mesh = (2, 2, 2)
    config.model.path = str(ROOT / config.model.path)
    config.data.path = str(ROOT / config.data.path)
    config.data.eval_path = str(ROOT / config.data.eval_path)
    config.adapter.pattern = r"layers/.*/q_proj/kernel"
    config.adapter.rank = 4
    config.adapter.dropout = 0.1
    config.method.launch_step = 2
    config.eval.limit = 8
    config.eval.batch_size = 8
    config.train.batch_size = 8
    config.train.micro_batches = 2
    config.train.steps = 6
    config.train.log_every = 1
    config.cache_dir = "off"
    with config.unlocked():
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            setattr(config[section] if section else config, name, value)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tsd"
    execute(train.prepare(small_config(), workdir))
    return workdir


def test_run_leaves_every_file_of_its_contract(finished):
    expected = {
        *("config.json", "metrics.jsonl", "summary.json", "directions.npz"),
        *("adapter", "adapter.safetensors", "checkpoints", "plots"),
    }
    found = {path.name for path in finished.iterdir()}
    assert expected <= found
    assert [name for name in found if name.startswith("events.out")]
    assert {path.name for path in (finished / "plots").iterdir()} == {
        *("loss.png", "spectra.png", "overlap.png")
    }
    assert not [name for name in found if name.endswith(".part")]


def test_the_adapter_file_says_all_that_the_peft_adapter_says(finished, tmp_path):
    saved = tsd.load_adapter(finished / "adapter.safetensors")
    assert (saved.launched, saved.spec.method.name) == (True, "tsd")
    rankings = np.load(finished / "directions.npz")
    assert saved.indices is not None
    for path, indices in saved.indices.items():
        np.testing.assert_array_equal(indices, rankings[f"{path}/indices"])
    assert set(saved.indices) == set(saved.spec.paths)
    assert main([str(finished), "--to", "peft", "--out", str(tmp_path)]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        written = (tmp_path / name).read_bytes()
        assert written == (finished / "adapter" / name).read_bytes()


def test_summary_and_metrics_tell_the_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["method"], summary["launch_step"], summary["steps"]) == (
        "tsd",
        2,
        6,
    )
    assert summary["before"]["count"] == summary["after"]["count"] == 8
    # r (in + out) for A and B and 8 gains, in each of 4 layers.
    assert summary["trainable_params"] == 4 * (4 * (96 + 96) + 8)
    assert summary["adapter_rank"] == 4 + 8
    for name in ("train_tokens_per_second", "compile_seconds", "extract_seconds"):
        assert summary[name] > 0
    assert summary["peak_memory_bytes"] > 1e8
    rows = [
        json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["phase"] for row in steps] == ["prelaunch"] * 2 + ["dash"] * 4
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(steps[0])


def test_directions_hold_what_was_launched(finished):
    with np.load(finished / "directions.npz") as arrays:
        sigma = arrays["layers/self_attn/q_proj/kernel/sigma"]
        rates = arrays["layers/self_attn/q_proj/kernel/rates"]
        indices = arrays["layers/self_attn/q_proj/kernel/indices"]
    assert (sigma.shape, rates.shape, indices.shape) == ((4, 96), (4, 96), (4, 8))
    for layer in range(4):
        assert set(indices[layer]) == set(np.argsort(-rates[layer])[:8])


def test_a_run_that_decides_for_itself(tmp_path):
    """On eight devices: when to launch, and how many directions a matrix trains."""
    config = small_config(
        method__auto_launch=True,
        auto_launch__launch_min=2,
        auto_launch__launch_max=4,
        auto_launch__every=1,
        auto_launch__patience=1,
        auto_launch__threshold=0.05,
        adapter__auto_directions=True,
    )
    execute(train.prepare(config, tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (launched,) = (row["step"] for row in rows if row["kind"] == "launch")
    assert summary["launch_step"] == launched == 2
    checks = [row for row in rows if row["kind"] == "settling"]
    assert [row["step"] for row in checks] == [1, 2]
    assert 0.05 <= checks[1]["overlap"] <= 1
    with np.load(tmp_path / "run" / "directions.npz") as arrays:
        used = arrays["layers/self_attn/q_proj/kernel/used"]
    assert used.shape == (4, 1)
    assert summary["directions"] == {
        "layers/self_attn/q_proj/kernel": used[:, 0].tolist()
    }
    assert used.min() < 8
    assert (tmp_path / "run" / "plots" / "gains.png").stat().st_size > 0
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for layer, count in enumerate(used[:, 0]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        assert len(tensors[name]) == 4 + max(4, count)


def test_a_run_that_launches_before_its_first_step(tmp_path):
    config = small_config(
        method__name="dash",
        method__launch_step=0,
        method__discovery="gradient",
        method__discovery_batches=2,
    )
    execute(train.prepare(config, tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["launch_step"], summary["adapter_rank"]) == (0, 4 + 8)
    with np.load(tmp_path / "run" / "directions.npz") as arrays:
        rates = arrays["layers/self_attn/q_proj/kernel/rates"]
    assert (rates[:, :-1] > 0).all(), "there is a change to rank by"


def test_a_run_with_added_tokens_and_parts(tmp_path):
    """Its rows and a norm train; exports have them, and the tokenizer."""
    config = small_config(
        method__name="lora",
        model__added_tokens=("<fair>", "<street>"),
        adapter__full_params=r"(.*/)?norm/scale",
        adapter__dropout=0.0,
        optimizer__full_learning_rate=0.02,
        train__steps=3,
    )
    run = train.prepare(config, tmp_path / "run")
    assert run.base.network.config.vocab_size == 1181
    assert [(p.path, p.rows) for p in run.spec.full] == [
        ("embed_tokens/embedding", (1179, 1181)),
        ("norm/scale", None),
    ]
    execute(run)
    saved = tsd.load_adapter(tmp_path / "run" / "adapter.safetensors")
    base = load_file(ROOT / demo.ASSETS / "model" / "model.safetensors")
    table = base["model.embed_tokens.weight"].astype(np.float32)
    rows = np.asarray(saved.trainable.full["embed_tokens/embedding"].value)
    assert 0 < np.abs(rows - table.mean(0)).max() < 0.07  # 3 steps of at most 0.02
    norm = np.asarray(saved.trainable.full["norm/scale"].value)
    moved = np.abs(norm - base["model.norm.weight"].astype(np.float32))
    assert 0.02 < moved.max() < 0.07
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("full_learning_rate") for line in metrics]
    assert max(rate or 0 for rate in rates) == pytest.approx(0.02)
    out = tmp_path / "merged"
    assert main([str(tmp_path / "run"), "--to", "merged", "--out", str(out)]) == 0
    merged = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(merged[:1179], base["model.embed_tokens.weight"])
    np.testing.assert_array_equal(merged[1179:], rows.astype(merged.dtype))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 1181
    tokenizer = load_tokenizer(out)
    assert tokenizer.convert_tokens_to_ids(["<fair>", "<street>"]) == [1179, 1180]
    assert main([str(tmp_path / "run"), "--to", "peft", "--out", f"{out}2"]) == 0
    for file in (tmp_path / "run" / "adapter").iterdir():
        assert (tmp_path / "merged2" / file.name).read_bytes() == file.read_bytes()


def test_finished_run_started_again_changes_nothing(finished, capsys):
    before = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    summary = json.loads((finished / "summary.json").read_text())
    execute(train.prepare(small_config(), finished))
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == before
    again = json.loads((finished / "summary.json").read_text())
    assert again["train_tokens_per_second"] == summary["train_tokens_per_second"]
    assert "step      1" not in capsys.readouterr().out


def test_stopped_and_gone_on_equals_uninterrupted(finished, tmp_path):
    run = train.prepare(small_config(), tmp_path / "cut")

    def batch(step):
        if step == 3:  # one step after launch; the step in hand still ends
            os.kill(os.getpid(), signal.SIGTERM)
        return run.batch(step)

    with pytest.raises(StopRequested):
        execute(dataclasses.replace(run, batch=batch))
    execute(run)
    name = Path("adapter") / "adapter_model.safetensors"
    whole, parts = load_file(finished / name), load_file(tmp_path / "cut" / name)
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(value, parts[key])


def test_workdir_of_another_config_is_refused_and_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(InputError, match=r"adapter.rank was 4, now 2"):
        execute(train.prepare(small_config(adapter__rank=2), finished))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_truncated_weights_are_refused_before_the_workdir_is_made(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in (ROOT / demo.ASSETS / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        execute(train.prepare(small_config(model__path=str(model)), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_experts_are_left_out_unless_asked_for(tmp_path):
    for path in (ROOT / demo.ASSETS / "model").glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_decoder(tmp_path, PUBLISHED["mixtral"])
    everything, default_rule = r"layers.*_proj/kernel", default.get_config().adapter

    def kernels(scan_layers, pattern):
        config = small_config(
            model__path=str(tmp_path),
            model__scan_layers=scan_layers,
            adapter__pattern=pattern,
        )
        return train.make_spec(
            config, train.open_model(config.model, train.data_settings(config))
        ).kernels

    assert len(kernels(True, everything)) == 7
    assert len(kernels(True, default_rule.pattern)) == 3
    assert len(kernels(False, everything)) == 4 * 7


BAD = {
    "model__path": ("no/such/folder", r"model folder no/such/folder does not exist"),
    "model__dtype": ("float16", r"model.dtype 'float16'"),
    "adapter__pattern": ("nothing.*", r"rule 'nothing\.\*' matches no parameter"),
    "adapter__full_params": ("norm", r"rule 'norm' matches no parameter; the nearest"),
    "model__added_tokens": (("<a>", "<a>"), r"has token '<a>' already"),
    "adapter__rank": (97, r"rank 97 is larger .* at most 96"),
    "adapter__directions": (100, r"directions 100 is larger"),
    "adapter__dropout": (1.5, r"dropout must be in"),
    "method__name": ("best", r"unknown method 'best'"),
    "method__launch_step": (6, r"launch_step 6 must lie in \[0, steps\)"),
    "method__discovery": ("guess", r"unknown method.discovery 'guess'"),
    "method__ranking": ("best", r"unknown ranking 'best'"),
    "method__start": ("p", r"unknown start 'p'"),
    "train__steps": (0, r"steps"),
    "train__batch_size": (9, r"train.batch_size 9 must be a multiple"),
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
    "a gradient nobody ranks by": (
        {"method__name": "milora", "method__discovery": "gradient"},
        r"directions from a gradient: method 'milora' ranks by 'smallest'",
    ),
    "a gradient without a launch": (
        {"method__name": "lora", "method__discovery": "gradient"},
        r"method.discovery='gradient' has no meaning for method 'lora'",
    ),
    "a gradient as a start": (
        {"method__start": "sigma+p", "method__discovery": "gradient"},
        r"directions from a gradient: start='sigma\+p' needs the change",
    ),
    "a gradient of no batch": (
        {"method__discovery": "gradient", "method__discovery_batches": 0},
        r"method.discovery_batches must be at least 1, not 0",
    ),
    "two ways to decide": (
        {
            **{"method__auto_launch": True, "method__discovery": "gradient"},
            **{"auto_launch__launch_min": 1, "auto_launch__every": 1},
            "auto_launch__patience": 1,
        },
        r"method.auto_launch=True waits .* choose one of them",
    ),
    "nothing to settle": (
        {"method__name": "lora", "method__auto_launch": True},
        r"method.auto_launch=True waits .* method 'lora' has no launch",
    ),
    "nothing that settles": (
        {"method__name": "pissa", "method__auto_launch": True},
        r"method.auto_launch=True waits .* method 'pissa' ranks by 'largest'",
    ),
    "bounds in the wrong order": (
        {"method__auto_launch": True, "auto_launch__launch_min": 4},
        r"auto_launch.launch_min 4 is larger than auto_launch.launch_max 3",
    ),
    "a threshold no overlap reaches": (
        {"method__auto_launch": True, "auto_launch__threshold": 1.5},
        r"auto_launch.threshold must lie in \(0, 1\], not 1.5",
    ),
    "a restart at a step not known": (
        {
            **{"method__auto_launch": True, "auto_launch__launch_min": 1},
            **{"auto_launch__every": 1, "auto_launch__patience": 1},
            "optimizer__restart": True,
        },
        r"optimizer.restart=True needs a launch whose step is known beforehand",
    ),
    "no change to rank by": (
        {"method__launch_step": 0},
        r"method.launch_step 0: method 'tsd' finds its directions in what training",
    ),
    "no change to start at": (
        {
            **{"method__name": "pissa", "method__start": "sigma+p"},
            "method__launch_step": 0,
        },
        r"method.launch_step 0: method 'pissa'",
    ),
    "an unknown quantization": (
        {"model__quantization": "fp3", "model__remat": True},
        r"unknown quantization 'fp3'; choose one of int8, nf4",
    ),
    "quantized and without remat": (
        {"model__quantization": "nf4", "model__quantization_tile": 32},
        r"model.quantization='nf4' without model.remat=True .*model.remat=True$",
    ),
    "a tile that divides nothing": (
        {"model__quantization": "nf4", "model__remat": True},
        r"layers/.*/kernel: its input axis of 96 .* tile of 64; use a tile of 48",
    ),
    "a tile of nothing": (
        {"model__quantization_tile": 32},
        r"model.quantization_tile needs a model.quantization",
    ),
    "nothing restarts": (
        {"method__name": "lora", "optimizer__restart": True},
        r"optimizer.restart=True needs a launch .* method 'lora' has none",
    ),
    "no room to restart": (
        {"optimizer__restart": True, "optimizer__warmup": 4},
        r"warmup 4 must be in \[0, steps\), steps are 4",
    ),
    "an expression of nothing": (
        {"adapter__full_params": "("},
        r"rule '\(': not a regular expression",
    ),
    "whole and adapted": (
        {"adapter__full_params": "layers/self_attn/q_proj/kernel"},
        r"matches only what earlier rules took",
    ),
    "start of nothing": (
        {"method__name": "dash", "method__start": "zero"},
        r"start='zero' has no meaning for method 'dash'",
    ),
}


@pytest.mark.parametrize("case", BAD_TOGETHER)
def test_settings_that_do_not_go_together_get_one_line(case, tmp_path):
    changes, message = BAD_TOGETHER[case]
    with pytest.raises(InputError, match=message) as caught:
        train.prepare(small_config(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_readings_reach_the_method_and_the_schedule(tmp_path):
    config = small_config(
        method__ranking="smallest",
        method__start="zero",
        method__launch_step=0,
    )
    run = train.prepare(config, tmp_path)
    assert run.spec.method == get_method("tsd", ranking="smallest", start="zero")
    assert run.plan.launch_step == 0
    config = small_config(optimizer__restart=True, optimizer__decay="linear")
    rates = train.prepare(config, tmp_path).rates
    peaks = {"learning_rate": 5e-3, "gain_learning_rate": 5e-3}
    for name, peak in peaks.items():
        got = [np.asarray(rates[name](step)) for step in range(6)]
        want = np.array([1, 5 / 6, 1, 3 / 4, 2 / 4, 1 / 4])
        np.testing.assert_allclose(got, peak * want, rtol=1e-6)


@pytest.mark.parametrize("key", BAD)
def test_bad_value_gets_one_line_before_anything_starts(key, tmp_path):
    value, message = BAD[key]
    with pytest.raises(InputError, match=message) as caught:
        train.prepare(small_config(**{key: value}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"instruction": "a", "output": "b"}, {"output": "c"}]',
            r"row 2 .*instruction",
        ),
        ("[]", r"holds no rows"),
        ("", r"is empty"),
        ("{", r"is not JSON"),
    ],
)
def test_bad_data_file_is_named_with_its_row(content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        train.prepare(small_config(data__path=str(path)), tmp_path / "run")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("metric", ["nll", "choices", "generate"])
def test_every_metric_scores_the_untouched_model(metric, tmp_path):
    config = small_config(eval__metric=metric, eval__max_new_tokens=2, mesh=(8, 1, 1))
    config.train.micro_batches = 1
    run = train.prepare(config, tmp_path)
    params = train.huggingface.load_params(run.base.folder, run.base.network.config)
    figures = run.evaluate({"params": params})
    assert all(np.isfinite(value) for value in figures.values())


def command(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_unknown_key_ends_with_code_2_and_the_nearest_key(tmp_path):
    run = ("--config=configs/demo.py", f"--workdir={tmp_path / 'run'}")
    done = command(*run, "--config.optimizer.learning_rte=1e-3")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "no key 'optimizer.learning_rte'" in line
    assert "did you mean 'optimizer.learning_rate'?" in line
    assert not (tmp_path / "run").exists()


def test_wrong_type_ends_with_code_2():
    done = command("--config=configs/demo.py", "--dry-run", "--config.train.steps=many")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "config.train.steps=many" in line


def test_dry_run_prints_the_plan_and_stops(tmp_path):
    done = command(
        "--config=configs/demo.py",
        f"--workdir={tmp_path / 'r'}",
        "--dry-run",
        "--config.adapter.dora=True",
    )
    assert done.returncode == 0, done.stderr
    assert "method tsd on DoRA, launch after step 24" in done.stdout
    assert re.search(r"layers/mlp/up_proj/kernel +4x96x256 +0 \| 1 \| 2", done.stdout)
    assert "trainable" in done.stdout
    assert not (tmp_path / "r").exists()


def test_configs_change_only_keys_of_the_default():
    known = train.flat_config(default.get_config()).keys()
    for module in (demo, stories_tsd, llama_tsd):
        assert train.flat_config(module.get_config()).keys() == known


def test_every_key_is_read_by_the_command_line():
    source = (ROOT / "train.py").read_text()
    fields = {field.name for field in dataclasses.fields(DataSettings)}
    for key in train.flat_config(default.get_config()):
        section, _, name = key.rpartition(".")
        read = section == "data" and name in fields
        assert read or re.search(rf"[.\"]{name}\b", source), key


def test_headers_are_looked_at_before_anything_runs(tmp_path):
    write_decoder(tmp_path, PUBLISHED["llama"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = small_config(model__path=str(tmp_path))
    with pytest.raises(InputError, match=r"lacks tensor 'model\.norm\.weight'"):
        train.open_model(config.model, train.data_settings(config))
