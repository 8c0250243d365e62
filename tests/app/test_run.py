"""Whole runs: what they leave, how they resume, and what they refuse to touch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import tsd_jax as tsd
from tests.helpers.demo_runs import (
    ASSETS,
    ROOT,
    carry_out,
    metrics,
    small_settings,
    summary,
)
from tsd_jax.app import export
from tsd_jax.app.build import prepare
from tsd_jax.app.run import execute, run
from tsd_jax.core.errors import InputError
from tsd_jax.huggingface import load_tokenizer
from tsd_jax.storage.adapter_file import load_adapter
from tsd_jax.storage.locks import held
from tsd_jax.training.loop import StopRequested

QUERIES = "layers/self_attn/q_proj/kernel"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "tsd"
    carry_out(small_settings(), workdir)
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
    assert export.main([str(finished), "--to", "peft", "--out", str(tmp_path)]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        written = (tmp_path / name).read_bytes()
        assert written == (finished / "adapter" / name).read_bytes()


def test_summary_and_metrics_tell_the_run(finished):
    told = summary(finished)
    assert (told["method"], told["launch_step"], told["steps"]) == ("tsd", 2, 6)
    assert told["before"]["count"] == told["after"]["count"] == 8
    # r (in + out) for A and B and 8 gains, in each of 4 layers.
    assert told["trainable_params"] == 4 * (4 * (96 + 96) + 8)
    assert told["adapter_rank"] == 4 + 8
    for name in ("train_tokens_per_second", "compile_seconds", "extract_seconds"):
        assert told[name] > 0
    assert told["peak_memory_bytes"] > 1e8
    steps = [row for row in metrics(finished) if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["phase"] for row in steps] == ["prelaunch"] * 2 + ["dash"] * 4
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(steps[0])


def test_directions_hold_what_was_launched(finished):
    with np.load(finished / "directions.npz") as arrays:
        sigma = arrays[f"{QUERIES}/sigma"]
        rates = arrays[f"{QUERIES}/rates"]
        indices = arrays[f"{QUERIES}/indices"]
    assert (sigma.shape, rates.shape, indices.shape) == ((4, 96), (4, 96), (4, 8))
    for layer in range(4):
        assert set(indices[layer]) == set(np.argsort(-rates[layer])[:8])


def test_a_run_that_decides_for_itself(tmp_path):
    """On eight devices: when to launch, and how many directions a matrix trains."""
    settings = small_settings(
        method__auto_launch=True,
        auto_launch__launch_min=2,
        auto_launch__launch_max=4,
        auto_launch__every=1,
        auto_launch__patience=1,
        auto_launch__threshold=0.05,
        adapter__auto_directions=True,
    )
    carry_out(settings, tmp_path)
    rows = metrics(tmp_path)
    (launched,) = (row["step"] for row in rows if row["kind"] == "launch")
    assert summary(tmp_path)["launch_step"] == launched == 2
    checks = [row for row in rows if row["kind"] == "settling"]
    assert [row["step"] for row in checks] == [1, 2]
    assert 0.05 <= checks[1]["overlap"] <= 1
    with np.load(tmp_path / "directions.npz") as arrays:
        used = arrays[f"{QUERIES}/used"]
    assert used.shape == (4, 1)
    assert summary(tmp_path)["directions"] == {QUERIES: used[:, 0].tolist()}
    assert used.min() < 8
    assert (tmp_path / "plots" / "gains.png").stat().st_size > 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer, count in enumerate(used[:, 0]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"
        assert len(tensors[name]) == 4 + max(4, count)


def test_a_run_that_launches_before_its_first_step(tmp_path):
    settings = small_settings(
        method__name="dash",
        method__launch_step=0,
        method__discovery="gradient",
        method__discovery_batches=2,
    )
    carry_out(settings, tmp_path)
    told = summary(tmp_path)
    assert (told["launch_step"], told["adapter_rank"]) == (0, 4 + 8)
    with np.load(tmp_path / "directions.npz") as arrays:
        rates = arrays[f"{QUERIES}/rates"]
    assert (rates[:, :-1] > 0).all(), "there is a change to rank by"


def test_a_run_with_added_tokens_and_full_params(tmp_path):
    """Its rows and a norm train; exports have them, and the tokenizer."""
    settings = small_settings(
        method__name="lora",
        model__added_tokens=("<fair>", "<street>"),
        adapter__full_params=r"(.*/)?norm/scale",
        adapter__dropout=0.0,
        optimizer__full_learning_rate=0.02,
        train__steps=3,
    )
    prepared, workdir = prepare(settings), tmp_path / "run"
    assert prepared.base.config.vocab_size == 1181
    assert [(p.path, p.rows) for p in prepared.spec.full] == [
        ("embed_tokens/embedding", (1179, 1181)),
        ("norm/scale", None),
    ]
    execute(settings, prepared, workdir)
    saved = tsd.load_adapter(workdir / "adapter.safetensors")
    base = load_file(ASSETS / "model" / "model.safetensors")
    table = base["model.embed_tokens.weight"].astype(np.float32)
    rows = np.asarray(saved.trainable.full["embed_tokens/embedding"].value)
    assert 0 < np.abs(rows - table.mean(0)).max() < 0.07  # 3 steps of at most 0.02
    norm = np.asarray(saved.trainable.full["norm/scale"].value)
    moved = np.abs(norm - base["model.norm.weight"].astype(np.float32))
    assert 0.02 < moved.max() < 0.07
    rates = [row.get("full_learning_rate") for row in metrics(workdir)]
    assert max(rate or 0 for rate in rates) == pytest.approx(0.02)
    assert_exported(workdir, tmp_path, base["model.embed_tokens.weight"], rows)


def assert_exported(workdir, tmp_path, table, rows):
    out = tmp_path / "merged"
    assert export.main([str(workdir), "--to", "merged", "--out", str(out)]) == 0
    merged = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(merged[:1179], table)
    np.testing.assert_array_equal(merged[1179:], rows.astype(merged.dtype))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 1181
    tokenizer = load_tokenizer(out)
    assert tokenizer.convert_tokens_to_ids(["<fair>", "<street>"]) == [1179, 1180]
    assert export.main([str(workdir), "--to", "peft", "--out", f"{out}2"]) == 0
    for file in (workdir / "adapter").iterdir():
        assert (tmp_path / "merged2" / file.name).read_bytes() == file.read_bytes()


def test_finished_run_started_again_changes_nothing(finished, capsys):
    before = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    told = summary(finished)
    carry_out(small_settings(), finished)
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == before
    again = summary(finished)
    assert again["train_tokens_per_second"] == told["train_tokens_per_second"]
    assert "step      1" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["lost", "damaged"])
def test_a_finished_run_without_its_directions_is_exported(
    finished, tmp_path, capsys, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    file = workdir / "directions.npz"
    file.unlink()
    if damage == "damaged":
        file.write_bytes(b"PK not a zip")
    carry_out(small_settings(), workdir)
    assert "exported without indices of directions: " in capsys.readouterr().out
    both = finished, workdir
    saved = [load_adapter(each / "adapter.safetensors") for each in both]
    assert saved[0].indices is not None
    assert saved[1].indices is None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        old, new = (each / "adapter" / name for each in both)
        assert old.read_bytes() == new.read_bytes()


def stopping_at(step, prepared):
    """Let a signal come while the batch of a step is made; that step still ends."""

    def batch(asked):
        if asked == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepared.batch(asked)

    return dataclasses.replace(prepared, batch=batch)


def test_stopped_and_resumed_equals_uninterrupted(finished, tmp_path):
    settings = small_settings()
    prepared, workdir = prepare(settings), tmp_path / "cut"
    with pytest.raises(StopRequested):
        execute(settings, stopping_at(3, prepared), workdir)  # one after launch
    execute(settings, prepared, workdir)
    name = Path("adapter") / "adapter_model.safetensors"
    uncut, resumed = load_file(finished / name), load_file(workdir / name)
    assert uncut.keys() == resumed.keys()
    for key, value in uncut.items():
        np.testing.assert_array_equal(value, resumed[key])


def test_a_run_that_is_stopped_says_so_and_ends_with_code_130(
    tmp_path, monkeypatch, capsys
):
    from tsd_jax.app import run as module

    monkeypatch.setattr(module, "prepare", lambda *s: stopping_at(1, prepare(*s)))
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    settings = small_settings(method__name="lora", train__steps=3)
    assert run(settings, tmp_path) == 130
    assert capsys.readouterr().err.endswith(
        "train.py: stopped by a signal after step 2; the same command resumes from "
        "there\n"
    )


def test_workdir_of_another_config_is_refused_and_left_alone(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(InputError, match=r"adapter.rank was 4, now 2"):
        carry_out(small_settings(adapter__rank=2), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_is_refused_before_anything_is_read(finished, tmp_path, monkeypatch):
    """By its workdir alone: of another config, without one, or held by another run."""
    from tsd_jax.app import run as module

    monkeypatch.setattr(module, "prepare", lambda settings: pytest.fail("read"))
    with pytest.raises(InputError, match=r"adapter.rank was 4, now 2"):
        run(small_settings(adapter__rank=2), finished)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds metrics.jsonl of a run"):
        run(small_settings(), tmp_path)
    with held(finished), pytest.raises(InputError, match="in use by another run"):
        run(small_settings(), finished)


def test_a_run_that_is_refused_leaves_no_workdir(tmp_path):
    settings = small_settings(data__path=str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        run(settings, tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_data_or_another_base_are_not_resumed(finished, monkeypatch):
    recorded = json.loads((finished / "config.json").read_text())["digests"]
    assert {"data.path", "model.path/model.safetensors"} <= recorded.keys()
    prepared = prepare(small_settings())
    assert dict(prepared.digests) == recorded
    other = dataclasses.replace(prepared, digests={**recorded, "data.path": "0"})
    told = r"task/train\.json \(data\.path\) is not what it was .* old file back"
    with pytest.raises(InputError, match=told):
        execute(small_settings(), other, finished)


def test_a_run_without_evaluation(tmp_path):
    settings = small_settings(
        method__name="lora", data__eval_path="", data__held_out=0.0, train__steps=2
    )
    prepared = prepare(settings)
    assert any(note.startswith("no evaluation") for note in prepared.notes)
    execute(settings, prepared, tmp_path / "run")
    told = summary(tmp_path / "run")
    assert (told["before"], told["after"]) == (None, None)
    assert not [row for row in metrics(tmp_path / "run") if row["kind"] == "eval"]


def test_workdir_of_an_older_version_is_refused_by_its_key(tmp_path):
    old = {"adapter.train_whole": "", "settling.every": 5}
    (tmp_path / "config.json").write_text(json.dumps({"config": old}))
    with pytest.raises(
        InputError,
        match=r"adapter\.train_whole, which is now adapter\.full_params; use",
    ):
        carry_out(small_settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_truncated_weights_are_refused_before_the_workdir_is_made(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in (ASSETS / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        carry_out(small_settings(model__path=str(model)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run(small_settings(), tmp_path / "run", dry_run=True) == 0
    told = capsys.readouterr().out
    assert "method tsd, launch after step 2, 6 steps" in told
    assert "held out" in told
    assert not (tmp_path / "run").exists()
