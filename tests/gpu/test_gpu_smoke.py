"""A short search and a retraining on a CUDA device; skipped, with the reason, where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.factories import options, recorded, write_config
from tools.gpucheck.data import make_prepared, small_schema
from tools.gpucheck.lab import ROWS


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_search_retrain_and_resume_on_cuda(tmp_path: Path, run_script: Callable, optimizer: str) -> None:
    # Processes of their own (fresh): CUDA does not survive a fork of one that has it already.
    # Made without polars, which a machine with a GPU may lack: training does not need it.
    data, run = make_prepared(tmp_path / "data", small_schema(), ROWS), tmp_path / "run"
    config = write_config(tmp_path / "tiny.yaml")
    where = [f"data.path={data}", f"run.dir={run}", "run.device=cuda", f"optim.embedding={optimizer}"]
    done = run_script("search.py", "--config", config, *options(where), timeout=280, fresh=True)
    assert "1 rank(s) on cuda" in done.stdout
    losses = recorded(run, "supernet", "loss")
    assert len(losses) == 24
    assert losses[-1] < losses[0]

    run_script("retrain.py", "--run", run, "--train.steps", 12, "--name", "short", timeout=280, fresh=True)
    own = run / "retrain" / "short"
    trained = json.loads((own / "evaluation.json").read_text())
    shown = run_script("evaluate.py", "--run", own, timeout=280, fresh=True)
    assert json.loads(shown.stdout)["auc"] == pytest.approx(trained["auc"], abs=1e-6)
    # The same model on the CPU gives the same figures: a checkpoint is not tied to a device.
    on_cpu = run_script("evaluate.py", "--run", own, "--run.device", "cpu", timeout=280, fresh=True)
    assert json.loads(on_cpu.stdout)["auc"] == pytest.approx(trained["auc"], abs=1e-4)
    # Started again, a finished training loads its last checkpoint, optimizers included.
    again = run_script("retrain.py", "--run", run, "--train.steps", 12, "--name", "short", timeout=280, fresh=True)
    assert "continuing from" in again.stdout
