"""A league from raw data to tables and pictures, stopped on the way, continued, and given a further method."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pytest
import yaml

from tests.launch.processes import ROOT
from tests.scripts import fork_script
from tools.studies import league
from tools.studies.jobs import Ended

TINY = ROOT / "tools" / "league" / "plans" / "tiny.yaml"


@dataclass
class Started:
    """Names of the commands that were started, in order, and one that is to fail the next time."""

    names: list[str] = field(default_factory=list)
    failing: str = ""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    """What the tool starts runs in forks of a process that has torch loaded."""
    found = Started()

    def run(command: list[str], printed: TextIO, environment: dict[str, str]) -> Ended:
        found.names.append(Path(printed.name).stem)
        if found.names[-1] == found.failing:
            found.failing = ""
            return Ended(1, 0.0, 0.0)
        env = environment | {"PYTHONPATH": str(ROOT)}
        done = fork_script(Path(command[3]), command[4:], ROOT, env, 120, tmp_path)
        assert done is not None
        printed.write(done.stdout + done.stderr)
        return Ended(done.returncode, 2.0, 0.5)

    monkeypatch.setattr("tools.studies.jobs.run_command", run)
    return found


def plan(folder: Path, **keys: Any) -> Path:
    """The shipped plan, of fewer rows and steps."""
    body = yaml.safe_load(TINY.read_text()) | keys
    step = body["prepare"][0]
    step["command"] = step["command"].replace("20000", "2000")
    body["extra"] |= {"train.steps": 3, "run.threads": 1}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_a_league_runs_continues_and_grows(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(*methods: str, options: tuple[str, ...] = ()) -> list[str]:
        """Starts the league; gives the commands that it started."""
        before = len(started.names)
        file = plan(tmp_path, methods=list(methods), widths=[32], seeds=1)
        assert league.main(["run", "--plan", str(file), "--out", str(out), "--jobs", "1", *options]) == 0
        return started.names[before:]

    started.failing = "seed0-random-10pct"
    with pytest.raises(SystemExit, match="seed0-random-10pct failed"):
        run("random")
    assert started.names[:3] == ["prepare-1", "seed0-search-random", "seed0-ues-32"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan 1 of 1: tiny" and lines[1].startswith("prepare-1: ") and "(1 of 1 done)" in lines[1]
    assert re.fullmatch(r"seed0-ues-32: \d+ s \(2 of 4 done, about \d+ min left\)", lines[3])
    again = run("random", "mde")
    assert again[:2] == ["seed0-search-mde", "seed0-random-10pct"]
    assert set(again[2:]) <= {"seed0-random-50pct", "seed0-mde-10pct", "seed0-mde-50pct"}
    assert run("random", "mde") == []

    rows = list(csv.DictReader((out / "league.csv").open()))
    assert [r["method"] for r in rows] == ["uniform", "random", "random", "mde", "mde"]
    for row in rows:
        assert row["data_set"] == "tiny" and row["hardware"] and row["commit"] != "unknown"
        assert 0.4 < float(row["test_auc"]) < 1 and int(row["served_int8_bytes"]) > 0
        assert str(tmp_path) not in row["command"]
    for row in rows[1:]:
        assert float(row["share_of_ues32"]) <= float(row["budget"].removesuffix("%")) / 100
        assert (row["search_cost"], row["cost_reference"]) == ("1.000", "UES-32")  # 2 s of the processor each
    text = (out / "league.md").read_text()
    assert "## tiny, deepfm" in text and "| mde 50% | 1 |" in text
    assert {p.name for p in out.glob("*.png")} == {"tiny-deepfm-parameters.png", "tiny-deepfm-int8.png", "cost.png"}

    assert run("random", "mde", "pep", options=("--searches",)) == ["seed0-search-pep"]
    costs = list(csv.DictReader((out / "search_costs.csv").open()))
    assert [(r["method"], r["search_cost"]) for r in costs] == [("random", "1.000"), ("mde", "1.000"), ("pep", "1.000")]
    assert str(tmp_path) not in "".join(r["command"] for r in costs)
    assert "| pep | 1.00 | 2 | 0.5 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_plan_runs_by_one_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "studies" / "league.py"), "run", "--plan", str(TINY)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "league.csv").open()))
    assert len(rows) == 2 * (2 + 3 * 2) and {r["seed"] for r in rows} == {"0", "1"}
    assert (tmp_path / "stability.png").exists() and (tmp_path / "ranks.png").exists()
