"""Comparing the results of two checkouts: times do not count, anything else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.make.same_results import compare


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    for name, seconds in (("before", 1.5), ("after", 2.5)):
        home = tmp_path / name / "ues" / "run"
        (home / "tb").mkdir(parents=True)
        (home / "weights.distcp").write_bytes(b"same")
        (home / "result.json").write_text(json.dumps({"auc": 0.5, "widths": {"a": 4}, "seconds": seconds}))
        (home / "metrics.jsonl").write_text(json.dumps({"loss": 0.1, "samples_per_s": seconds}) + "\n")
        (home / "tb" / f"events.{seconds}").write_bytes(name.encode())
    return tmp_path / "before", tmp_path / "after"


def test_only_times_differ(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*both) == []
    assert "3 of 3 files are equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("weights.distcp", "other"),
        ("result.json", '{"auc": 0.5, "widths": {"a": 8}, "seconds": 1.5}'),
        ("metrics.jsonl", '{"loss": 0.2, "samples_per_s": 1.5}\n'),
    ],
)
def test_another_weight_width_or_loss_is_told(both: tuple[Path, Path], file: str, content: str) -> None:
    (both[1] / "ues" / "run" / file).write_text(content)
    assert compare(*both) == [f"differs: ues/run/{file}"]


def test_a_file_that_one_side_lacks_is_told(both: tuple[Path, Path]) -> None:
    (both[1] / "ues" / "run" / "weights.distcp").unlink()
    assert compare(*both) == [f"only in {both[0]}: ues/run/weights.distcp"]


def test_what_only_the_later_side_tells_is_named_and_no_difference(
    both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = both[1] / "ues" / "run" / "result.json"
    file.write_text('{"auc": 0.5, "widths": {"a": 4, "b": 2}, "calibration": 1.0, "seconds": 1.5}')
    assert compare(*both) == []
    assert "tells more: ues/run/result.json: calibration, widths.b" in capsys.readouterr().out
    assert compare(*reversed(both)) == ["differs: ues/run/result.json"]  # something that was told is gone


def test_a_config_may_have_gained_keys_but_no_other_value(both: tuple[Path, Path]) -> None:
    for home, text in zip(both, ("train: {lr: 0.1}\n", "train: {lr: 0.1, group: ''}\n"), strict=True):
        (home / "ues" / "config.yaml").write_text(text)
    assert compare(*both) == []
    (both[1] / "ues" / "config.yaml").write_text("train: {lr: 0.2, group: ''}\n")
    assert compare(*both) == ["differs: ues/config.yaml"]
