from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.hub_cache import cached
from tests.helpers.trees import random_all
from tsd_jax import huggingface
from tsd_jax.app.export import main, recorded_labels
from tsd_jax.binding.linen import adapted, bind, make_spec
from tsd_jax.core.spec import Rule
from tsd_jax.data.classification import Labels
from tsd_jax.models.decoder import Decoder
from tsd_jax.storage.adapter_file import save_adapter

BASE = Path(__file__).resolve().parents[2] / "tsd_jax/demo/assets/model"
TOKENS = np.arange(1, 9)[None]
RULE = Rule(pattern=r"layers/.*/[qv]_proj/kernel", rank=3, alpha=3, directions=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with nothing but its adapter, and the logits it gives."""
    run = tmp_path_factory.mktemp("run")
    config = huggingface.read_config(BASE)
    params = huggingface.load_params(BASE, config, dtype="float32")
    model = Decoder(config)
    spec = make_spec(model.apply, {"params": params}, [RULE], TOKENS, method="tsd")
    trees = random_all(0, spec, 0.1)
    file = run / "adapter.safetensors"
    save_adapter(file, *trees, spec, launched=True, base_model=str(BASE))
    variables = {"params": bind(params, *trees)}
    return run, np.asarray(jax.jit(adapted(model.apply))(variables, TOKENS))


def logits(folder):
    config = huggingface.read_config(folder)
    params = huggingface.load_params(folder, config, dtype="float32")
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, TOKENS))


def run(source, to, out, *options):
    return main([str(source), "--to", to, "--out", str(out), *options])


def test_a_run_is_merged_into_its_base(trained, tmp_path, capsys):
    folder, expected = trained
    assert run(folder, "merged", tmp_path / "out", "--dtype", "float32") == 0
    assert "merged 8 modules, float32" in capsys.readouterr().out
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=2e-4)
    assert np.abs(logits(BASE) - expected).max() > 0.1
    assert huggingface.load_tokenizer(tmp_path / "out")


def test_rounding_is_told(trained, tmp_path, capsys):
    assert run(trained[0], "merged", tmp_path / "out") == 0
    assert "rounding changed what was merged by" in capsys.readouterr().out


def test_a_peft_folder_serves_as_well(trained, tmp_path, capsys):
    folder, expected = trained
    assert run(folder, "peft", tmp_path / "peft") == 0
    assert "adapter of rank 6 in" in capsys.readouterr().out
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    merged = tmp_path / "merged"
    assert run(tmp_path / "peft", "merged", merged, "--dtype", "float32") == 0
    np.testing.assert_allclose(logits(merged), expected, atol=2e-4)
    assert run(tmp_path / "peft", "peft", tmp_path / "again") == 0
    for name, tensor in load_file(tmp_path / "peft/adapter_model.safetensors").items():
        again = load_file(tmp_path / "again/adapter_model.safetensors")[name]
        np.testing.assert_array_equal(tensor, again)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_adapter_on_the_hub_is_exported_on_its_base_there(
    trained, tmp_path, monkeypatch, capsys, to
):
    source, cache = tmp_path / "adapter", tmp_path / "cache"
    assert run(trained[0], "peft", source, "--base", str(BASE)) == 0
    config = json.loads((source / "adapter_config.json").read_text())
    assert config["revision"] is None
    config |= {"base_model_name_or_path": "owner/base", "revision": "v2"}
    (source / "adapter_config.json").write_text(json.dumps(config))
    cached(monkeypatch, cache, "owner/adapter", contents(source))
    cached(monkeypatch, cache, "owner/base", contents(BASE), "b" * 40, ref="v2")
    options = ("--dtype", "float32") if to == "merged" else ()
    out = tmp_path / "out"
    assert run("owner/adapter", to, out, *options) == 0, capsys.readouterr().err
    if to == "merged":
        np.testing.assert_allclose(logits(out), trained[1], atol=2e-4)
    else:
        exported = json.loads((out / "adapter_config.json").read_text())
        assert exported["revision"] == "v2"
        assert exported["base_model_name_or_path"] == "owner/base"
    assert run("owner/none", to, tmp_path / "none") == 2
    assert "adapter 'owner/none' is not a local folder" in capsys.readouterr().err


def test_the_cost_of_a_smaller_rank_is_told(trained, tmp_path, capsys):
    file = trained[0] / "adapter.safetensors"
    assert run(file, "peft", tmp_path / "out", "--max-rank", "2") == 0
    told = capsys.readouterr().out
    assert "adapter of rank 2" in told
    assert "cut 8 modules; relative error 0." in told
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in factors.values()} == {2}


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("onnx", [], "invalid choice: 'onnx'"),
        ("peft", ["--max-rank", "none"], "invalid int value: 'none'"),
        ("peft", ["--max-rank", "0"], "max_rank must be at least 1"),
        ("peft", ["--dtype", "float32"], "a PEFT adapter is float32"),
        ("merged", ["--max-rank", "2"], "merged weights have no rank"),
        ("merged", ["--base", "nowhere/at/all"], "nowhere/at/all does not exist"),
        ("merged", ["--base", str(BASE.parent)], "config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    trained, tmp_path, capsys, to, options, words
):
    assert run(trained[0], to, tmp_path / "out", *options) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("export: error: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_sources_that_hold_no_adapter_are_refused(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "none", BASE / "config.json"):
        assert run(source, "peft", tmp_path / "out") == 2
        assert str(source) in capsys.readouterr().err
    assert run(trained[0], "merged", BASE) == 2
    assert "the base's own folder" in capsys.readouterr().err


def test_labels_are_those_a_run_recorded(tmp_path):
    assert recorded_labels(tmp_path) is None
    labels = {"problem": "classification", "count": 2, "names": ["no", "yes"]}
    (tmp_path / "config.json").write_text(json.dumps({"labels": labels}))
    assert recorded_labels(tmp_path) == Labels("classification", 2, ("no", "yes"))
