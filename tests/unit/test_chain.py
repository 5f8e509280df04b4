"""The study of a whole chain: its commands, where a run stands, and what is kept over a stop."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from embsearch_dist.files import write_json
from tools.studies import chain
from tools.studies.chain import Record, compare, plan, where


def arguments(out: Path, config: Path, *beside: str) -> argparse.Namespace:
    return argparse.Namespace(
        config=config, data=Path("DATA"), out=out, ranks=1, threads=2, beside=list(beside), kill=False, extra=["a.b=1"]
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    search = {"candidates": [0, 2, 64], "budget": "25%"}
    body = {"method": "auto", "train": {"batch_size": 4, "epochs": 2}, "search": search}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_further_models_begin_with_fresh_weights_and_rules_search_first(tmp_path: Path, config: Path) -> None:
    steps = plan(arguments(tmp_path, config, "ues-16", "magnitude"))
    assert [label for label, _, _ in steps] == [
        "chain", "retrain", "retrain ues-16", "search magnitude", "retrain magnitude"
    ]  # fmt: skip
    by_label = {label: (script, words) for label, script, words in steps}
    own = ["--data.path=DATA", f"--run.dir={tmp_path}", "--a.b=1"]
    assert by_label["chain"] == ("search.py", ["--config", str(config), *own])
    fresh = ["--allocation", "ues-16", "--name", "ues-16", "--finetune", "false"]
    assert by_label["retrain ues-16"] == ("retrain.py", ["--run", str(tmp_path), *fresh])
    assert str(tmp_path / "allocations" / "magnitude.json") in by_label["retrain magnitude"][1]
    rule = yaml.safe_load((tmp_path / "magnitude.yaml").read_text())
    assert rule["method"] == "truncation" and rule["train"] == {"batch_size": 4, "epochs": 2}
    # It cuts the search's widest model down, and obeys the same budget.
    assert rule["search"] == {"rule": "magnitude", "width": 64, "weighted": True, "budget": "25%"}


def test_where_a_run_stands(tmp_path: Path) -> None:
    out, began = tmp_path / "run", time.time() - 5
    assert where(out, "search.py", began) == ("start", 0, 0)
    write_json(tmp_path / "data" / "schema.json", {"rows": {"train": 40}})
    body = {"data": {"path": str(tmp_path / "data")}, "train": {"batch_size": 4, "epochs": 2}, "search": {}}
    write_json(out / "stages" / "widest.json", {})
    (out / "config.yaml").write_text(yaml.safe_dump(body))
    for place in (out / "widest", out / "retrain" / "auto"):
        place.mkdir(parents=True)
        (place / "metrics.jsonl").write_text(json.dumps({"stage": "retrain", "step": 7}) + "\n{torn")
    assert where(out, "search.py", began) == ("widest", 7, 20)
    assert where(out, "retrain.py", began) == ("retrain auto", 7, 20)
    # What an earlier command has left is not what this one is at.
    for old in (out / "stages" / "widest.json", out / "retrain" / "auto"):
        os.utime(old, (began - 60, began - 60))
    assert where(out, "search.py", began) == ("start", 0, 20)
    assert where(out, "retrain.py", began)[0] == "retrain"


def test_a_stop_loses_no_seconds_and_no_finished_command(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, config, "ues-16")
    begun: list[str] = []

    def watch(args: argparse.Namespace, label: str, script: str, words: list[str], record: Record) -> None:
        begun.append(label)
        record.stage(label, label)["seconds"] += 2.5
        record.save()
        if label == "retrain" and begun.count(label) == 1:
            raise SystemExit("cut off")

    monkeypatch.setattr(chain, "watch", watch)
    monkeypatch.setattr("sys.argv", ["chain.py", "--config", str(config), "--data", "DATA", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="cut off"):
        chain.main()
    chain.main()
    assert begun == ["chain", "retrain", "retrain"]
    record = Record(args)
    assert [record.stages[name]["seconds"] for name in ("chain", "retrain")] == [2.5, 5.0]
    assert record.finished["retrain"] == "python launch/retrain.py --run OUT"
    lines = (tmp_path / "chain.csv").read_text().splitlines()
    assert lines[0].startswith("commit,command,seed") and len(lines) == 3
    monkeypatch.setattr("sys.argv", [*sys.argv, "--extra", "train.epochs=9"])
    with pytest.raises(
        SystemExit, match="chain was .*launch/search.py .*now is .*--train.epochs=9. Give another --out"
    ):
        chain.main()
    assert begun == ["chain", "retrain", "retrain"]


def test_a_record_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written every few moments, for hours."""
    args = argparse.Namespace(out=tmp_path)
    record = Record(args)
    record.finished = {"chain": "python launch/search.py"}
    record.save()
    whole = Path.write_text

    def full(path: Path, text: str, *given: Any, **named: Any) -> int:
        whole(path, text[:20], *given, **named)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    record.finished["retrain"] = "python launch/retrain.py"
    with pytest.raises(OSError, match="No space left"):
        record.save()
    assert list(Record(args).finished) == ["chain"]


def test_an_unknown_model_beside_is_refused(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config), "--data", "DATA", "--out", str(tmp_path / "run"), "--beside", "ues-x"]
    monkeypatch.setattr("sys.argv", ["chain.py", *words])
    with pytest.raises(SystemExit):
        chain.main()
    assert "--beside ues-x: neither ues-WIDTH nor one of fdo, magnitude" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_runs_without_a_model_do_not_count_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        write_json(tmp_path / name / "allocation.json", {"widths": {"a": 4}})
    assert compare(tmp_path / "one", tmp_path / "other") == 1
    assert "test metrics: MISSING in both" in capsys.readouterr().out
    for name in ("one", "other"):
        write_json(tmp_path / name / "retrain" / "x" / "evaluation.json", {"auc": 0.7})
        files = {"a.distcp": "0" * 8, ".metadata": name}
        write_json(tmp_path / name / "retrain" / "x" / "checkpoints" / "step-1" / "manifest.json", {"files": files})
    assert compare(tmp_path / "one", tmp_path / "other") == 0
