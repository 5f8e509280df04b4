"""``search.py`` as a user starts it: one process, torchrun, torchx, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.schema import Schema
from tests.factories import command_line, recorded
from tests.launch.processes import DIST_DDP, LAUNCH, finish, wait_for_checkpoint

# Eighteen checkpoints, so that a kill lands between two of them.
SLOW = ["search.supernet.epochs=3", "search.supernet.evals_per_epoch=6"]


def widths(run: Path) -> dict[str, int]:
    return json.loads((run / "allocation.json").read_text())["widths"]


def test_a_search_writes_all_a_person_needs(data: Path, config: Path, tmp_path: Path, run_script: Callable) -> None:
    run = tmp_path / "run"
    done = run_script("search.py", "--config", config, *command_line(data, run, "search.pareto=[30%]"))
    assert f"next: python launch/retrain.py --run {run}" in done.stdout
    assert "found: left=" in done.stdout
    assert "Traceback" not in done.stderr
    schema = Schema.load(data)
    assert Schema.load(run).fingerprint == schema.fingerprint
    assert Allocation.load(run / "allocation.json", schema).widths == widths(run)
    assert (run / "config.yaml").exists()
    assert (run / "search" / "pareto.json").exists()
    assert (run / "allocations" / "adass-30pct.json").exists()
    assert len(recorded(run, "supernet", "loss")) == 24
    assert len(recorded(run, "search", "reward_mean")) == 8

    # The run directory brings its own config; a new budget leaves the supernet as it is.
    again = run_script("search.py", "--run.dir", run, "--search.budget", "30%")
    assert "stage supernet: done before, skipped" in again.stdout
    assert len(recorded(run, "supernet", "loss")) == 24
    small = Allocation.load(run / "allocation.json", schema)
    assert small.total("parameters") <= 0.3 * 32 * sum(schema.cardinalities)

    # Starting over is asked for, and then nothing old stays.
    (run / "retrain" / "old").mkdir(parents=True)
    fresh = run_script("search.py", "--run.dir", run, "--run.overwrite", "true", "--search.policy.steps", 2)
    assert "skipped" not in fresh.stdout
    assert len(recorded(run, "search", "reward_mean")) == 2
    assert not (run / "retrain").exists()
    kept = run_script("search.py", "--run.dir", run)  # and it was asked for once only
    assert "stage supernet: done before, skipped" in kept.stdout


@pytest.mark.slow  # tests/pretend/test_script.py kills a search in earnest, too, and tests/launch/test_restart.py ranks
def test_a_killed_search_goes_on_and_ends_like_an_unbroken_one(
    data: Path, config: Path, tmp_path: Path, start: Callable, run_script: Callable
) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    words = "--config", config, *command_line(data, killed, *SLOW)
    process = start(sys.executable, LAUNCH / "search.py", *words)
    wait_for_checkpoint(process, killed)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, code=-signal.SIGKILL)
    assert json.loads((killed / "stages" / "supernet.json").read_text())["state"] == "running"
    assert not (killed / "allocation.json").exists()

    assert "continuing from" in run_script("search.py", *words).stdout
    run_script("search.py", "--config", config, *command_line(data, unbroken, *SLOW))
    assert widths(killed) == widths(unbroken)
    assert recorded(killed, "supernet", "loss") == recorded(unbroken, "supernet", "loss")
    for name in ("auc", "logloss"):
        point = [json.loads((d / "search" / "pareto.json").read_text())["points"][0] for d in (killed, unbroken)]
        assert point[0][name] == point[1][name]


def test_torchx_runs_the_search_on_two_ranks(data: Path, config: Path, tmp_path: Path, start: Callable) -> None:
    pytest.importorskip("torchx")
    run = tmp_path / "run"
    told = finish(start(*DIST_DDP, "search.py", "--config", config, *command_line(data, run)))
    assert "2 rank(s) on cpu" in told
    assert set(widths(run)) == {"left", "big", "right", "idle"}
    assert len(recorded(run, "supernet", "loss")) == 24


def test_help_names_every_option_and_trains_nothing(run_script: Callable, tmp_path: Path) -> None:
    done = run_script("search.py", "--help", cwd=tmp_path)
    assert "--config FILE" in done.stdout
    assert "search.policy.lambda_r [0.0025]" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_print_config_shows_what_a_run_would_use(run_script: Callable, config: Path, tmp_path: Path) -> None:
    done: Any = run_script("search.py", "--config", config, "--train.epochs", 7, "--print-config", cwd=tmp_path)
    assert "epochs: 7" in done.stdout
    assert "hidden:\n  - 8\n  - 4" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]
