from __future__ import annotations

import json

import pytest

from tsd_jax.core.errors import InputError
from tsd_jax.storage import run_files
from tsd_jax.storage.atomic import write_json

CONFIG = {"method.name": "tsd", "train.steps": 100, "mesh": (1, -1, 1), "seed": 0}


def test_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert run_files.read_lines(path) == []
    rows = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-30}]
    run_files.write_lines(path, rows)
    assert run_files.read_lines(path) == rows
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_cut_off_last_line_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    run_files.write_lines(path, [{"step": 1}, {"step": 23}])
    path.write_text(path.read_text()[:-cut])
    want = [{"step": 1}, {"step": 23}] if cut == 1 else [{"step": 1}]
    assert run_files.read_lines(path) == want


def claim(workdir, free=(), **changes):
    return run_files.claim_workdir(workdir, {**CONFIG, **changes}, free)


@pytest.fixture
def used(tmp_path):
    """Leave a run's config behind."""
    write_json(tmp_path / "config.json", {"config": CONFIG, "jax": "1.2"})
    return tmp_path


def test_a_fresh_workdir_is_not_touched(tmp_path):
    assert not claim(tmp_path / "new" / "run")
    assert not claim(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "summary.json", "directions.npz", "adapter.safetensors"),
        *("adapter", "checkpoints", "plots", "events.out.tfevents.1"),
    ],
)
def test_files_of_a_run_without_its_config_are_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"holds {name} of a run, but no config.json"):
        claim(tmp_path)
    (tmp_path / "events.out.tfevents.2").write_text("")
    with pytest.raises(InputError, match=r"holds .* and 1 more of a run"):
        claim(tmp_path)
    write_json(tmp_path / "config.json", {"config": CONFIG})
    assert claim(tmp_path), "the way out that the line names"


def test_files_of_others_do_not_matter(tmp_path):
    for name in (".lock", "notes.txt", "slurm-1.out"):
        (tmp_path / name).write_text("")
    assert not claim(tmp_path)


def test_files_that_changed_are_named(tmp_path):
    config = {"data.path": "rows.json", "model.path": "folder"}
    digests = {"data.path": "1", "model.path/sub/model.safetensors": "2"}
    write_json(tmp_path / "config.json", {"config": config, "digests": digests})

    def check(**changes):
        run_files.check_digests(tmp_path, config, {**digests, **changes})

    check()
    check(**{"model.path/new.json": "3"})  # what a later version looks at as well
    with pytest.raises(InputError, match=r"^rows.json \(data.path\) is not what"):
        check(**{"data.path": "9"})
    told = r"^folder/sub/model.safetensors \(model.path\) is not what .* old file back"
    with pytest.raises(InputError, match=told):
        check(**{"model.path/sub/model.safetensors": "9"})
    with pytest.raises(InputError, match=r"^rows\.json"):
        run_files.check_digests(tmp_path, config, {})


def test_a_run_without_digests_goes_on(used):
    run_files.check_digests(used, CONFIG, {"data.path": "1"})


def test_a_workdir_of_the_same_config_goes_on(used):
    """Tuples come back from JSON as lists, and are the same."""
    before = (used / "config.json").read_bytes()
    assert claim(used)
    assert (used / "config.json").read_bytes() == before


def test_free_keys_may_differ(used):
    assert claim(used, free=("mesh", "new"), mesh=(8, 1, 1), new=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.steps": 200}, r"train\.steps was 100, now 200; use a new --workdir"),
        ({"method.name": "lora"}, r"method\.name was 'tsd', now 'lora'; use"),
        ({"mesh": (2, 2, 2)}, r"mesh was \[1, -1, 1\], now \[2, 2, 2\]; use"),
        ({"new.key": 1}, r"new\.key was None, now 1; use"),
        ({"seed": 1, "train.steps": 1}, r"seed was 0, now 1 \(and 1 more\); use"),
    ],
)
def test_another_config_is_refused_by_key(used, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        claim(used, **changes)
    assert str(used) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_gone_is_named(used):
    config = {key: value for key, value in CONFIG.items() if key != "seed"}
    with pytest.raises(InputError, match="seed was 0, now None"):
        run_files.claim_workdir(used, config, ())


def test_a_file_in_the_place_of_the_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match=r"run is a file; name a folder"):
        claim(tmp_path / "run")
    with pytest.raises(InputError, match=r"run is a file; name a folder"):
        claim(tmp_path / "run" / "below")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[1]", b"null", b'{"config": [1]}', b"\xff\xfe\x00"],
    ids=["empty", "cut", "no config", "list", "null", "config a list", "binary"],
)
def test_an_unreadable_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json is not the config of a run"):
        claim(tmp_path)


def test_a_folder_in_the_place_of_the_config(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json is not the config of a run"):
        claim(tmp_path)


def test_configs_are_compared_as_they_are_written(used):
    """A config that JSON changes is the same after a round trip."""
    text = json.loads((used / "config.json").read_text())
    assert text["config"]["mesh"] == [1, -1, 1]
    assert claim(used, mesh=[1, -1, 1])
