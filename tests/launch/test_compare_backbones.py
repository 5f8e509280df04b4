"""The comparison of backbones: its commands, a tiny one from start to table, and what it does a second time."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest

from tests.launch.processes import ROOT
from tests.scripts import fork_script
from tools.studies.jobs import Ended


@pytest.fixture
def tool() -> ModuleType:
    return importlib.import_module("tools.studies.compare_backbones")


def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_backbones.py", *map(str, arguments)])
    tool.main()


def test_a_dry_run_lists_a_training_for_each_seed_width_and_backbone(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs" / "movielens_1m_time" / "adass_deepfm.yaml"
    own = ["--settings", "masknet:model.options.structure=serial"]
    call(tool, monkeypatch, "--config", config, "--data", "D", "--out", tmp_path, "--widths", "8,16", *own, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert len({line.split(":")[0] for line in lines}) == len(lines) == 3 * 2 * 6
    assert [line.split(":")[0] for line in lines[:2]] == ["deepfm-8-seed0", "dcnv2-8-seed0"]
    serial = [line for line in lines if "--model.options.structure=serial" in line]
    assert len(serial) == 6 and all("--model.backbone=masknet" in line for line in serial)
    with pytest.raises(SystemExit, match="--settings mine: not among the backbones"):
        call(tool, monkeypatch, "--config", config, "--data", "D", "--out", tmp_path, "--settings", "mine:a.b=1")


def test_a_tiny_comparison_leaves_figures_with_their_origin_and_trains_nothing_twice(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, config: Path
) -> None:
    started = []

    def run(command: list[str], printed: TextIO, environment: dict[str, str]) -> Ended:
        started.append(command[command.index("--name") + 1])
        env = environment | {"PYTHONPATH": str(ROOT)}
        done = fork_script(Path(command[3]), command[4:], ROOT, env, 120, tmp_path)
        assert done is not None
        printed.write(done.stdout + done.stderr)
        return Ended(done.returncode, 0.0, 0.5)

    monkeypatch.setattr("tools.studies.jobs.run_command", run)
    out = tmp_path / "out"
    words = ["--config", config, "--data", data, "--out", out, "--widths", "2", "--seeds", "2", "--jobs", "1"]
    words += ["--backbones", "deepfm,dcnv2", "--extra", "train.steps=3", "run.threads=1"]
    call(tool, monkeypatch, *words)
    assert started == ["deepfm-2", "dcnv2-2"] * 2
    call(tool, monkeypatch, *words)
    assert len(started) == 4
    rows = list(csv.DictReader((out / "backbones.csv").open()))
    assert [(r["backbone"], r["seed"]) for r in rows] == [
        ("deepfm", "0"),
        ("dcnv2", "0"),
        ("deepfm", "1"),
        ("dcnv2", "1"),
    ]
    assert all("--model.backbone=" + r["backbone"] in r["command"] and str(out) not in r["command"] for r in rows)
    assert all(r["commit"] != "unknown" and r["hardware"] and 0.4 < float(r["test_auc"]) < 1 for r in rows)
    assert rows[0]["embedding_parameters"] == rows[1]["embedding_parameters"]
    gains = [float(b["test_auc"]) - float(a["test_auc"]) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    line = (out / "backbones.md").read_text().splitlines()[-1]
    assert line.startswith("| dcnv2 | 2 | 2 |") and f"| {sum(gains) / 2:+.4f} (s.e. " in line
