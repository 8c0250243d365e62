from __future__ import annotations

import io
import json
import re
import sys

import pytest

from tsd_jax.training import recorder as recorder_module
from tsd_jax.training.recorder import LoadingBar, Recorder


def recorder(workdir, *, start=0, launched=False, active=True) -> Recorder:
    return Recorder(workdir, steps=9, start=start, launched=launched, active=active)


def steps(rows) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in rows]


@pytest.fixture
def workdir(tmp_path):
    """Leave a run behind that got to step 4, with its launch after step 3."""
    with recorder(tmp_path) as log:
        log.evaluation(0, {"nll": 2.5, "count": 7})
        for step in (1, 2, 3):
            log.train(step, "prelaunch", loss=1 / step, tokens_per_second=10.0)
        log.log("launch", 3, extract_seconds=0.5)
        log.train(4, "dash", loss=0.25, tokens_per_second=10.0)
        log.evaluation(4, {"nll": 2.0, "count": 7})
    return tmp_path


def read(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


OLD = [("eval", 0), ("train", 1), ("train", 2), ("train", 3)]
LAUNCH, NEW = ("launch", 3), [("train", 4), ("eval", 4)]


def test_rows_are_written_as_they_come(tmp_path):
    with recorder(tmp_path) as log:
        log.train(1, "prelaunch", loss=0.5, tokens_per_second=2.0)
        row = {"kind": "train", "step": 1, "phase": "prelaunch", "loss": 0.5}
        assert read(tmp_path) == [{**row, "tokens_per_second": 2.0}]
        assert log.rows == read(tmp_path)


@pytest.mark.parametrize(
    ("start", "launched", "kept"),
    [
        (0, False, OLD[:1]),
        (2, False, OLD[:3]),
        (3, False, OLD),
        (3, True, [*OLD, LAUNCH]),
        (4, True, [*OLD, LAUNCH, *NEW]),
    ],
    ids=["start", "before launch", "at launch", "just launched", "end"],
)
def test_rows_after_the_state_gone_on_from_are_dropped(workdir, start, launched, kept):
    with recorder(workdir, start=start, launched=launched) as log:
        assert steps(log.rows) == kept
        assert read(workdir) == log.rows
        log.train(start + 1, "dash", loss=0.125, tokens_per_second=10.0)
    assert steps(read(workdir)) == [*kept, ("train", start + 1)]


def test_a_line_cut_off_by_a_crash_is_dropped(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    with recorder(workdir, start=4, launched=True) as log:
        assert steps(log.rows) == [*OLD, LAUNCH, *NEW]
        log.train(5, "dash", loss=0.125, tokens_per_second=10.0)
    assert steps(read(workdir)) == [*OLD, LAUNCH, *NEW, ("train", 5)]


def test_find(workdir):
    with recorder(workdir, start=4, launched=True) as log:
        assert log.find("eval", 0) == {"nll": 2.5, "count": 7}
        assert log.find("eval", 4) == {"nll": 2.0, "count": 7}
        assert log.find("eval", 3) is None
        assert log.find("launch", 3) == {"extract_seconds": 0.5}


def test_lines_on_a_terminal_without_a_bar(tmp_path, capsys):
    with recorder(tmp_path) as log:
        log.train(3, "prelaunch", loss=1.23456, tokens_per_second=12345.6)
        log.evaluation(4, {"nll": 0.5, "tokens": 12345})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step      3  prelaunch  loss 1.2346  12,346 tokens/s"
    assert lines[1] == "step      4  evaluation  nll 0.5000  tokens 12,345"


def launch(log: Recorder, monkeypatch, times: list[float]) -> None:
    """Launch five matrices after step 3: begun at 100 s, told of each at a time."""
    clock = iter([100.0, *(100 + seconds for seconds in times)])
    monkeypatch.setattr(recorder_module, "monotonic", lambda: next(clock))
    log.launch_begins(3)
    for done in range(1, 6):
        log.launching(done, 5)
    log.launched(3, times[-1])


def test_lines_about_a_launch_come_now_and_then(tmp_path, capsys, monkeypatch):
    with recorder(tmp_path) as log:
        launch(log, monkeypatch, [4.0, 12.0, 15.0, 24.0, 36.0])
    assert capsys.readouterr().out.splitlines() == [
        "step      3  launch: ranking directions ...",
        "step      3  launch     2/5 matrices  12 s, about 18 s left",
        "step      3  launch     4/5 matrices  24 s, about 6 s left",
        "step      3  launched in 36.0 s",
    ]
    assert read(tmp_path) == [{"kind": "launch", "step": 3, "extract_seconds": 36.0}]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_how_far_a_launch_is(tmp_path, monkeypatch):
    """In matrices, with the time it has taken and the time it still takes."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    with recorder(tmp_path) as log:
        log.train(2, "prelaunch", loss=0.5, tokens_per_second=2.0)
        launch(log, monkeypatch, [1.0, 64.0, 66.0, 68.0, 70.0])
        shown = sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    seen = re.findall(r"(launch \S+ matrices \[\S+\]): .*?(\d)/9", shown)
    assert seen[1] == ("launch 2/5 matrices [01:04<01:36]", "3")
    assert seen[-1] == ("launch 5/5 matrices [01:10<00:00]", "3")
    assert re.split(r"[\r\n]", shown)[-1].startswith("dash:")


def test_only_the_first_process_writes(tmp_path, capsys):
    with recorder(tmp_path, active=False) as log:
        log.launch_begins(1)
        log.launching(1, 2)
        log.launched(1, 0.5)
        log.train(1, "prelaunch", loss=0.5, tokens_per_second=2.0)
        log.say("something")
        assert log.find("train", 1) is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_figures_reach_tensorboard(workdir):
    """One event file for each part of the run, with every figure's tag in it."""
    (events,) = workdir.glob("events.out.*")
    content = events.read_bytes()
    for tag in (b"train/loss", b"train/tokens_per_second", b"eval/nll", b"launch/"):
        assert tag in content
    assert b"train/phase" not in content


def test_loading_is_told_by_quiet_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(recorder_module, "monotonic", lambda: next(clock))
    with LoadingBar() as bar:
        for done in (1, 2, 3):
            bar(done * 10**9, 4 * 10**9)
    assert capsys.readouterr().out == "weights: 2.0 of 4.0 GB\n"


def test_loading_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(
        recorder_module.sys.stderr, "isatty", lambda: True, raising=False
    )
    with LoadingBar() as bar:
        bar(3 * 10**9, 4 * 10**9)
    told = capsys.readouterr()
    assert told.out == ""
    assert "weights:  75%" in told.err
    assert "3.00G/4.00G" in told.err


def test_other_processes_tell_nothing_of_loading(capsys, monkeypatch):
    monkeypatch.setattr(
        recorder_module.sys.stderr, "isatty", lambda: True, raising=False
    )
    monkeypatch.setattr(recorder_module, "QUIET_SECONDS", -1.0)
    with LoadingBar(active=False) as bar:
        bar(3, 4)
    assert capsys.readouterr() == ("", "")
