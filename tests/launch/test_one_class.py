"""Splits with rows of one class only: what is said before training, and what is written where AUC is undefined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embsearch_dist.files import read_json
from tests.factories import command_line, prepared_rows, write_config

COLUMNS = ["--run.tf32", "false", "--train.epochs", "1", "--search.supernet.epochs", "1"]


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1000 rows by time; the newest 200, validation and test, have no click."""
    rng = np.random.default_rng(0)
    lines = [
        f"{int(k < 800 and rng.random() < 0.4)},{k},{'u' if u else 'v'}{u % 9},{rng.random():.3f}"
        for k, u in enumerate(rng.integers(0, 30, 1000))
    ]
    return prepared_rows(tmp_path_factory.mktemp("one_class"), lines, "user")


def test_a_search_that_ranks_by_auc_stops_before_it_trains(one_class: Path, tmp_path: Path, run_script: Callable):
    config, run = write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    done = run_script("search.py", "--config", config, *command_line(one_class, run), check=False)
    assert done.returncode == 2
    assert "the validation split has rows of one class only (100 rows, 0 clicks)" in done.stderr
    assert "--search.policy.metric logloss does not" in done.stderr
    assert not run.exists()


def test_logloss_selects_and_null_is_written_with_its_reason(one_class: Path, tmp_path: Path, run_script: Callable):
    config, run = write_config(tmp_path / "tiny.yaml"), tmp_path / "run"
    by_logloss = [*COLUMNS, "--search.policy.metric", "logloss"]
    done = run_script("search.py", "--config", config, *command_line(one_class, run), *by_logloss)
    assert "AUC is undefined; logloss selects the best checkpoint" in done.stdout
    assert "validation auc -  logloss" in done.stdout and "nan" not in done.stdout
    done = run_script("retrain.py", "--run", run, *COLUMNS, "--train.epochs", "3", "--train.patience", "0")
    assert "the test split has rows of one class only (100 rows, 0 clicks): AUC is undefined" in done.stdout
    assert "test auc -  logloss" in done.stdout
    model = run / "retrain" / "adass"
    result = read_json(model / "evaluation.json")
    assert result["auc"] is None and "one class" in result["auc_undefined"]
    lines = [line for line in done.stdout.splitlines() if "validation auc" in line]
    loglosses = [float(line.split("logloss ")[1].split()[0]) for line in lines]
    best = [line.endswith("(best)") for line in lines]
    assert [k for k, b in enumerate(best) if b][-1] == int(np.argmin(loglosses))  # of numbers, never of NaN
    done = run_script("evaluate.py", "--run", model, "--split", "train")
    assert read_json(model / "evaluation-train.json")["auc"] > 0
    run_script("report.py", run)
    page = (run / "report" / "index.html").read_text()
    assert "rows are of one class only" in page and ">nan" not in page
