"""Monitor: what lands in the files, what a resume forgets, what other ranks do not do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from embsearch_dist.train import monitor as module
from embsearch_dist.train import progress as progress_module
from embsearch_dist.train.matrix_picture import draw_matrix
from embsearch_dist.train.monitor import Monitor


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSONL files do not depend on TensorBoard; leaving it out keeps the tests quick."""
    monkeypatch.setattr(Monitor, "_tensorboard_writer", lambda self: None)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


@pytest.mark.usefixtures("no_tensorboard")
def test_scalars_write_one_line_each(tmp_path: Path, clock: Clock) -> None:
    with Monitor(tmp_path / "run", "supernet") as monitor:
        monitor.scalars(10, {"loss": torch.tensor(0.5), "samples": 7})
        monitor.scalars(10, {"auc": 0.75, "logloss": math.nan, "lr": math.inf}, split="validation", epoch=1.0)
        # Line-buffered: a reader sees the lines while the run goes on.
        lines = read(tmp_path / "run" / "metrics.jsonl")
    assert lines[0] == {"time": 1.7e9 + 100, "stage": "supernet", "step": 10, "loss": 0.5, "samples": 7}
    assert lines[1]["split"] == "validation" and lines[1]["epoch"] == 1.0
    assert lines[1]["auc"] == 0.75 and lines[1]["logloss"] is None and lines[1]["lr"] is None


@pytest.mark.usefixtures("no_tensorboard")
def test_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with Monitor(tmp_path, "s") as monitor:
        with pytest.raises(ValueError, match="'step' is taken"):
            monitor.scalars(1, {"step": 3.0})
        with pytest.raises(ValueError, match="'split' is taken"):
            monitor.scalars(1, {"split": 3.0}, split="test")


@pytest.mark.usefixtures("no_tensorboard")
def test_resume_forgets_later_steps_of_this_stage_only(tmp_path: Path) -> None:
    with Monitor(tmp_path, "search") as other:
        other.scalars(99, {"reward": 0.1})
    with Monitor(tmp_path, "supernet") as first:
        for step in (1, 2, 3):
            first.scalars(step, {"loss": float(step)})
            first.heatmap(step, "P_F", [[0.5]], ["keep"], ["a"])
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"stage": "supernet", "st')  # killed while writing
    with Monitor(tmp_path, "supernet") as second:
        second.resume_at(2)
        second.scalars(3, {"loss": -3.0})
    lines = read(tmp_path / "metrics.jsonl")
    assert [(x["stage"], x["step"]) for x in lines] == [
        ("search", 99),
        ("supernet", 1),
        ("supernet", 2),
        ("supernet", 3),
    ]
    assert lines[-1]["loss"] == -3.0
    assert [x["step"] for x in read(tmp_path / "heatmaps.jsonl")] == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("no_tensorboard")
def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "st')
    with Monitor(tmp_path, "a") as monitor:
        monitor.scalars(5, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["step"] == 5


@pytest.mark.usefixtures("no_tensorboard")
def test_heatmap_line(tmp_path: Path) -> None:
    with Monitor(tmp_path, "supernet") as monitor:
        monitor.heatmap(4, "P_E", torch.tensor([[0.25, float("nan")]], requires_grad=True), ["user"], ["2", "8"])
        with pytest.raises(ValueError, match=r"\(1, 2\) values for 1 rows, 3 columns"):
            monitor.heatmap(4, "P_E", np.zeros((1, 2)), ["user"], ["2", "8", "16"])
    assert read(tmp_path / "heatmaps.jsonl") == [
        {
            "stage": "supernet",
            "step": 4,
            "name": "P_E",
            "rows": ["user"],
            "columns": ["2", "8"],
            "values": [[0.25, None]],
        }
    ]


def test_other_ranks_do_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with Monitor(run, "supernet", rank=1) as monitor:
        monitor.resume_at(0)
        monitor.scalars(1, {"loss": 1.0})
        monitor.heatmap(1, "P_E", [[1.0]], ["a"], ["2"])
        monitor.figure(1, "x", None)
        monitor.say("hello")
        with monitor.progress(10, "steps") as progress:
            progress.update(10, loss=1.0)
        monitor.flush()
    assert not run.exists()
    assert capfd.readouterr() == ("", "")


def test_quiet_records_but_shows_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Monitor(tmp_path, "s", quiet=True) as monitor:
        monitor.say("hello")
        with monitor.progress(10, "steps") as progress:
            progress.update(10)
    assert progress.done == 10
    assert capfd.readouterr() == ("", "")


def test_plain_progress_lines(tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, "supernet")
    with monitor.progress(10_000, "steps", initial=1_000) as progress:
        for _ in range(9):
            clock.now += 4
            progress.update(100, loss=torch.tensor(0.51234), samples_per_s=38_123.4)
            monitor.say("said")
    out, err = capfd.readouterr()
    assert out == "said\n" * 9
    lines = err.splitlines()
    # 36 seconds at one line per 10 seconds or more, 4 seconds a step: after 12 and 24 and 36 seconds, and the last one.
    assert len(lines) == 4
    assert lines[0] == "supernet   13%  1,300/10,000 steps  38.1k samples/s  loss 0.5123  eta 0:05:48"
    assert lines[-1] == "supernet   19%  1,900/10,000 steps  38.1k samples/s  loss 0.5123  stopped after 0:00:36"


def test_plain_progress_end_and_own_rate(tmp_path: Path, clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    progress = Monitor(tmp_path, "search").progress(200, "steps")
    clock.now += 100
    progress.update(200)
    progress.close()
    progress.close()
    assert capfd.readouterr().err == "search  100%  200/200 steps  2 steps/s  done in 0:01:40\n"


def test_tensorboard_gets_scalars_and_images_and_resume_purges(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Monitor(tmp_path, "supernet") as monitor:
        for step in (1, 2, 3):
            monitor.scalars(step, {"loss": float(step)})
        monitor.scalars(3, {"auc": 0.7, "logloss": math.nan}, split="validation", epoch=1.0)
        monitor.heatmap(1, "P_E", [[0.1, 0.9]], ["a" * 60], ["2", "8"])
        monitor.resume_at(1)
        monitor.scalars(2, {"loss": -2.0})
    events = loading.EventAccumulator(str(tmp_path / "tb" / "supernet"))
    events.Reload()
    assert events.Tags()["scalars"] == ["supernet/loss", "supernet/validation/auc"]
    assert [(e.step, e.value) for e in events.Scalars("supernet/loss")] == [(1, 1.0), (2, -2.0)]
    assert events.Tags()["images"] == ["supernet/P_E"]


def test_a_purge_is_read_last_whatever_the_names_of_event_files(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Monitor(tmp_path, "s") as monitor:
        for last in range(12):  # numbers of more than one length within a second: .9 and .10
            for step in (1, 2, 3):
                monitor.scalars(step, {"loss": float(10 * last + step)})
            if last == 6:  # a host whose clock is an hour ahead has written too
                monitor.close()
                for path in (tmp_path / "tb" / "s").iterdir():
                    stamp = path.name.split(".")[3]
                    path.rename(path.with_name(path.name.replace(stamp, str(int(stamp) + 3600))))
            monitor.resume_at(0)
    events = loading.EventAccumulator(str(tmp_path / "tb" / "s"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("s/loss")] == [(1, 111.0), (2, 112.0), (3, 113.0)]


def test_pictures_are_some_seconds_apart_and_the_last_one_is_drawn(tmp_path: Path, clock: Clock) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Monitor(tmp_path, "supernet") as monitor:
        for step in range(9):
            for name, last in (("P_E", 9), ("P_F", 7)):
                if step < last:
                    monitor.heatmap(step, name, [[0.1, 0.9]], ["a"], ["2", "8"])
            clock.now += 4
        monitor.resume_at(6)
    events = loading.EventAccumulator(str(tmp_path / "tb" / "supernet"))
    events.Reload()
    assert [e.step for e in events.Images("supernet/P_E")] == [0, 3, 6]  # what was left of step 8 is forgotten
    assert [e.step for e in events.Images("supernet/P_F")] == [0, 3, 6]
    with Monitor(tmp_path, "search") as monitor:
        for step in range(3):
            monitor.heatmap(step, "P", [[float(step)]], ["a"], ["2"])
    events = loading.EventAccumulator(str(tmp_path / "tb" / "search"))
    events.Reload()
    assert [e.step for e in events.Images("search/P")] == [0, 2]
    assert [x["step"] for x in read(tmp_path / "heatmaps.jsonl") if x["stage"] == "search"] == [0, 1, 2]


@pytest.mark.parametrize(("count", "shown"), [(8, 8), (64, 64), (65, 33), (1200, 64)])
def test_a_heat_map_of_many_fields_names_some_of_them(count: int, shown: int) -> None:
    names = [f"f{i}" for i in range(count)]
    for rows, columns in ((names, ["2", "8"]), (["keep"], names)):
        axes = draw_matrix(np.zeros((len(rows), len(columns))), rows, columns, "P").axes[0]
        axis = axes.yaxis if rows is names else axes.xaxis
        found = {
            int(place): label.get_text()
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        }
        assert 0.45 * min(count, 64) < len(found) <= 64
        assert all(label == names[place] for place, label in found.items())
        assert count > 64 or len(found) == shown
