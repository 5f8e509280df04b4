"""A short search and a retraining on a CUDA device; skipped, with the reason, where there is none.

The scripts run in this process: to start Python, torch and CUDA anew for each takes ten times as long as what they do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import evaluate, retrain, search
from tests.factories import options, recorded, write_config
from tools.gpucheck.data import make_prepared, small_schema
from tools.gpucheck.lab import ROWS, script


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_search_retrain_and_resume_on_cuda(tmp_path: Path, optimizer: str) -> None:
    # Made without polars, which a machine with a GPU may lack: training does not need it.
    data, run = make_prepared(tmp_path / "data", small_schema(), ROWS), tmp_path / "run"
    config = write_config(tmp_path / "tiny.yaml")
    where = [f"data.path={data}", f"run.dir={run}", "run.device=cuda", f"optim.embedding={optimizer}"]
    assert "1 rank(s) on cuda" in script(search.main, "--config", config, *options(where))
    losses = recorded(run, "supernet", "loss")
    assert len(losses) == 24
    assert losses[-1] < losses[0]

    short = ["--run", run, "--train.steps", 12, "--name", "short"]
    script(retrain.main, *short)
    own = run / "retrain" / "short"
    trained = json.loads((own / "evaluation.json").read_text())
    shown = script(evaluate.main, "--run", own)
    assert json.loads(shown)["auc"] == pytest.approx(trained["auc"], abs=1e-6)
    # The same model on the CPU gives the same figures: a checkpoint is not tied to a device.
    on_cpu = script(evaluate.main, "--run", own, "--run.device", "cpu")
    assert json.loads(on_cpu)["auc"] == pytest.approx(trained["auc"], abs=1e-4)
    # Started again, a finished training loads its last checkpoint, optimizers included.
    assert "continuing from" in script(retrain.main, *short)
