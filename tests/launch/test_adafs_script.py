"""AdaFS through ``search.py``: from a config file to a result that the report shows, also after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embsearch_dist.report.runs import load_run
from embsearch_dist.train.faults import VARIABLE
from tests.factories import command_line, recorded

CONFIG = """
method: adafs
model: {backbone: mlp, hidden: [8, 4]}
optim: {embedding_lr: 0.05, dense_lr: 0.01}
search:
  width: 4
  training: {batch_size: 256, eval_batch_size: 200, epochs: 2, log_every: 1, save_every: 3}
  outer: {pretrain_epochs: 1, every: 3}
"""


@pytest.fixture
def adafs(tmp_path: Path) -> Path:
    (tmp_path / "adafs.yaml").write_text(CONFIG)
    return tmp_path / "adafs.yaml"


def test_search_leaves_a_result_and_the_report_shows_it(
    data: Path, adafs: Path, tmp_path: Path, run_script: Callable
) -> None:
    run = tmp_path / "run"
    done = run_script("search.py", "--config", adafs, *command_line(data, run, "search.mode=hard"))
    assert "controller: 2 of 4 fields a row" in done.stdout
    assert f"-> {run / 'retrain' / 'adafs-hard'}" in done.stdout
    assert "Traceback" not in done.stderr
    result = json.loads((run / "retrain" / "adafs-hard" / "evaluation.json").read_text())
    assert 0.4 < result["auc"] < 1
    assert [(r.name, r.seed, r.numbers["auc"]) for r in load_run(run).results] == [("adafs-hard", 0, result["auc"])]
    page = Path(run_script("report.py", run).stdout.strip()).read_text()
    assert "adafs-hard" in page and "field weights" in page
    again = run_script("search.py", "--run.dir", run)
    assert "stage controller: done before, skipped" in again.stdout
    assert "stage test: done before, skipped" in again.stdout, again.stdout


@pytest.mark.slow  # bitwise continuation is a unit test as well
def test_a_killed_search_ends_like_an_unbroken_one(
    data: Path, adafs: Path, tmp_path: Path, run_script: Callable
) -> None:
    results = []
    for name, fault in (("unbroken", ""), ("killed", "kill stage=controller step=17")):
        words = ["--config", adafs, *command_line(data, tmp_path / name, "run.seed=5")]
        if fault:
            broken = run_script("search.py", *words, env={VARIABLE: fault}, check=False)
            assert broken.returncode == -9
            assert not (tmp_path / name / "retrain").exists()
        done = run_script("search.py", *words)
        assert ("continuing from" in done.stdout) == bool(fault)
        results.append(json.loads((tmp_path / name / "retrain" / "adafs-soft-seed5" / "evaluation.json").read_text()))
    assert results[0]["auc"] == results[1]["auc"] and results[0]["logloss"] == results[1]["logloss"]
    assert (results[0]["name"], results[0]["seed"]) == ("adafs-soft", 5)
    assert recorded(tmp_path / "killed", "controller", "loss") == recorded(tmp_path / "unbroken", "controller", "loss")
