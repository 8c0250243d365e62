"""Runs that start from an adapter begin with its score, and go on from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tsd_jax as tsd
from tests.helpers.demo_runs import carry_out, metrics, small_settings, summary
from tests.helpers.hub_cache import cached
from tsd_jax.app.build import prepare
from tsd_jax.app.run import execute
from tsd_jax.app.settings import Settings
from tsd_jax.app.start import open_start
from tsd_jax.core.errors import InputError
from tsd_jax.storage.adapter_file import save_adapter

QUICK = {"train__steps": 3, "eval__limit": 4, "eval__batch_size": 8}
LORA = {"method__name": "lora", **QUICK}


def resumed(settings: Settings, workdir: Path) -> None:
    execute(settings, prepare(settings, workdir), workdir)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a finished run of tsd."""
    folder = tmp_path_factory.mktemp("runs") / "tsd"
    carry_out(small_settings(**QUICK), folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a finished run of plain LoRA."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    carry_out(small_settings(**LORA), folder)
    return folder


def test_a_launched_run_goes_on_with_its_directions(ran, tmp_path):
    start = shutil.copytree(ran, tmp_path / "start")
    settings = small_settings(adapter__start=str(start), **QUICK)
    workdir = tmp_path / "run"
    resumed(settings, workdir)
    assert summary(workdir)["before"] == summary(ran)["after"]
    assert summary(workdir)["launch_step"] is None
    assert not [row for row in metrics(workdir) if row["kind"] == "launch"]
    phases = {row["phase"] for row in metrics(workdir) if row["kind"] == "train"}
    assert phases == {"dash"}
    before, after = (
        tsd.load_adapter(each / "adapter.safetensors") for each in (ran, workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, before.directions, after.directions)
    assert after.launched
    record = json.loads((workdir / "config.json").read_text())["start"]
    assert record["name"] == str(start)
    assert record["launched"] is True
    assert len(record["sha256"]) == 64
    shutil.rmtree(start)  # a checkpoint needs it no more
    resumed(settings, workdir)
    assert json.loads((workdir / "config.json").read_text())["start"] == record


@pytest.mark.parametrize("form", ["run", "file", "peft", "hub"])
def test_plain_lora_goes_on_from_every_form(plain, tmp_path, monkeypatch, form):
    folder = plain / "adapter"
    path = {
        "run": str(plain),
        "file": str(plain / "adapter.safetensors"),
        "peft": str(folder),
        "hub": "owner/adapter",
    }[form]
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    cached(monkeypatch, tmp_path / "cache", "owner/adapter", files)
    changes = dict(LORA)
    if form in ("peft", "hub"):
        changes["adapter__alpha"] = 4.0  # exported with its scale in the factors
    workdir = tmp_path / "run"
    carry_out(small_settings(adapter__start=path, **changes), workdir)
    before = summary(workdir)["before"]
    want = summary(plain)["after"]
    assert before.keys() == want.keys()
    for name, figure in want.items():
        np.testing.assert_allclose(before[name], figure, rtol=1e-5)
    assert summary(workdir)["after"] != before


def test_pre_launch_goes_on_from_it(plain):
    prepared = prepare(small_settings(adapter__start=str(plain), **QUICK))
    assert prepared.plan.launch_step == 2
    assert any("method.keep=True keeps it" in note for note in prepared.notes)
    kept = small_settings(adapter__start=str(plain), method__keep=True, **QUICK)
    assert not any("keeps it" in note for note in prepare(kept).notes)


def refused(message, **changes):
    with pytest.raises(InputError, match=message) as caught:
        prepare(small_settings(**QUICK | changes))
    assert "\n" not in str(caught.value)


def test_what_has_no_meaning_is_refused(ran, plain, tmp_path):
    refused(
        "was launched by .*tsd.* export it --to peft",
        adapter__start=str(ran),
        method__name="lora",
    )
    restart = {"optimizer__restart": True}
    refused("has launched already: leave it False", adapter__start=str(ran), **restart)
    pissa = {"method__name": "pissa", "method__launch_step": 0}
    refused("no effect with method 'pissa'", adapter__start=str(plain), **pissa)
    refused("'no/adapter' is not a local folder", adapter__start="no/adapter")
    refused("holds neither adapter", adapter__start=str(tmp_path))
    refused(
        "gains is 8, the spec has 4", adapter__start=str(ran), adapter__directions=4
    )


def test_a_run_without_a_checkpoint_needs_the_same_adapter(plain, tmp_path):
    start = shutil.copytree(plain, tmp_path / "start")
    settings = small_settings(adapter__start=str(start), **LORA)
    found = open_start(settings, None)
    assert found is not None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"start": found.record}))
    again = open_start(settings, tmp_path / "run")
    assert again is not None
    assert again.record == found.record
    assert again.adapter is not None
    file = start / "adapter.safetensors"
    saved = tsd.load_adapter(file)
    other = jax.tree.map(lambda x: x + 1, saved.trainable)
    save_adapter(file, other, saved.directions, saved.spec, launched=False)
    with pytest.raises(InputError, match="has changed since the run in"):
        open_start(settings, tmp_path / "run")
