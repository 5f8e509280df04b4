"""The study of predicted steps: what it asks plan.py, and its table."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools.studies import predicted_steps


def plan(milliseconds: float, megabytes: list[float]) -> dict[str, Any]:
    per_rank = {"hbm": [m * 2**20 for m in megabytes]}
    imbalance = {"time": 1.25, "bytes": 1.5}
    return {"parameters": 80, "step_ms": milliseconds, "bytes": {"per_rank": per_rank}, "imbalance": imbalance}


def test_a_line_for_each_model_and_columns_for_each_number_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        ranks = int(command[command.index("--world-size") + 1])
        plans = {"supernet": plan(1.0 / ranks, [3.0, 4.0]), "ues-8": plan(0.5 / ranks, [1.0, 2.0])}
        return subprocess.CompletedProcess(command, 0, json.dumps({"allocations": plans}))

    monkeypatch.setattr(predicted_steps.subprocess, "run", run)
    monkeypatch.setattr(predicted_steps, "commit", lambda: "abc")
    words = ["--data", "DATA", "--out", str(tmp_path), "--world-sizes", "8,16", "--allocation", "ues-8"]
    monkeypatch.setattr("sys.argv", ["predicted_steps.py", *words])
    predicted_steps.main()
    assert all("--supernet" in command and command[-2:] == ["--allocation", "ues-8"] for command in asked)
    rows = list(csv.DictReader((tmp_path / "predicted.csv").open()))
    assert [(r["model"], r["ms_8"], r["ms_16"], r["mib_8"], r["imbalance_8"]) for r in rows] == [
        ("supernet", "0.1250", "0.0625", "4.0", "1.25"),
        ("ues-8", "0.0625", "0.0312", "2.0", "1.25"),
    ]
    assert rows[0]["commit"] == "abc" and "--world-sizes 8,16" in rows[0]["command"]
    assert "supernet: 80 parameters  8 GPUs 0.1250 ms  16 GPUs 0.0625 ms" in capsys.readouterr().out


def test_a_failed_plan_names_the_number_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(["plan.py"], 2, "")
    monkeypatch.setattr(predicted_steps.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr("sys.argv", ["predicted_steps.py", "--data", "DATA", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"plan.py failed for 8 GPUs \(exit code 2\)"):
        predicted_steps.main()
