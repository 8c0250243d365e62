"""The embedded demo from any folder; tests/test_package.py runs it from the wheel."""

from __future__ import annotations

import pytest

from tests.helpers.demo_runs import ASSETS, small_settings
from tsd_jax.app import demo, run


def test_its_settings_are_those_of_its_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = demo.demo_settings("lora", ASSETS)
    assert settings.method.name == "lora"
    assert settings.train.steps == 120
    assert settings.model.path == str(ASSETS / "model")
    assert settings.data.path == str(ASSETS / "task/train.json")
    assert settings.data.eval_path == str(ASSETS / "task/test.json")


@pytest.fixture
def short(monkeypatch):
    """Let the demo train as briefly as a test may."""
    monkeypatch.setattr(
        demo, "demo_settings", lambda name, _: small_settings(method__name=name)
    )


def test_it_trains_by_both_methods_and_compares(short, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--workdir", "mine"]) == 0
    told = capsys.readouterr().out
    assert "accuracy before and after 6 steps" in told
    rows = [line.split()[:2] for line in told.splitlines()]
    assert ["tsd", "1"] in rows
    assert ["lora", "1"] in rows
    for method in demo.METHODS:
        assert (tmp_path / "mine" / method / "adapter.safetensors").is_file()


def test_it_ends_as_a_run_that_was_stopped_does(short, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run", lambda settings, workdir: 130)
    assert demo.main(["--workdir", str(tmp_path)]) == 130


def test_bad_arguments_get_one_line(capsys):
    assert demo.main(["--speed", "3"]) == 2
    assert capsys.readouterr().err.startswith("tsd-demo: error: ")
