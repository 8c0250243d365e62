from __future__ import annotations

import json

import pytest

from tsd_jax.app.compare import compare, main


def finished(folder, *, method="tsd", seed=0, after=0.5, keep=False):
    folder.mkdir(parents=True)
    config = {"seed": seed, "method.name": method, "method.keep": keep}
    summary = {
        "method": method,
        "keep": keep,
        "before": {"accuracy": 0.25, "count": 8},
        "after": {"accuracy": after, "count": 8},
        "launch_step": None if method == "lora" else 40,
        "steps": 200,
        "trainable_params": 1234,
        "train_tokens_per_second": 1000.0,
    }
    (folder / "config.json").write_text(json.dumps({"config": config}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_seeds_of_one_config_share_a_row_with_mean_and_deviation(tmp_path):
    runs = [finished(tmp_path / f"{n}", seed=n, after=0.8 + n / 10) for n in range(3)]
    text = compare([*runs, finished(tmp_path / "lora", method="lora")])
    head, columns, tsd, lora, *places = text.splitlines()
    assert head == "accuracy before and after 200 steps"
    assert columns.split() == [
        *("method", "seeds", "before", "after", "launch", "trainable", "tokens/s")
    ]
    after = ["0.9000", "±", "0.1000"]
    assert tsd.split() == [
        *("tsd", "3", "0.2500", "±", "0.0000", *after, "40", "1,234", "1,000")
    ]
    assert lora.split()[:5] == ["lora", "1", "0.2500", "0.5000", "-"]
    assert str(tmp_path / "lora" / "adapter") in places[-1]


def test_readings_do_not_share_a_row(tmp_path):
    one = finished(tmp_path / "a")
    other = finished(tmp_path / "b", keep=True)
    rows = compare([one, other]).splitlines()[2:4]
    assert [row.split()[:2] for row in rows] == [["tsd", "1"], ["tsd", "keep"]]


def test_unfinished_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "none holds no finished run" in capsys.readouterr().err


def test_a_run_without_evaluation_is_named(tmp_path, capsys):
    folder = finished(tmp_path / "run")
    told = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**told, "after": None}))
    assert main([str(folder)]) == 2
    assert "run holds a run without evaluation: leave it" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[]])
def test_without_runs_it_tells_its_use(argv, capsys):
    assert main(argv) == 2
    assert "RUN [RUN ...]" in capsys.readouterr().err
