"""tools/studies/chain.py from start to table, on a tiny data set."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.processes import ROOT


@pytest.mark.slow
def test_a_chain_and_further_models(data: Path, tmp_path: Path) -> None:
    body = {
        "method": "auto",
        "model": {"hidden": [8]},
        "train": {"batch_size": 256, "epochs": 1},
        "search": {"candidates": [0, 2, 4], "width": 4, "budget": "ues-2", "rows": 300, "basis_rows": 300},
    }
    config, out = tmp_path / "auto.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(body))
    words = ["--config", config, "--data", data, "--out", out, "--ranks", "1", "--beside", "ues-4", "fdo"]
    tool = [sys.executable, str(ROOT / "tools/studies/chain.py")]
    for _ in range(2):  # the second time nothing is left to do
        subprocess.run([*tool, *map(str, words)], check=True, timeout=240, cwd=tmp_path)
    with (out / "chain.csv").open() as file:
        rows = list(csv.DictReader(file))
    models = {r["model"]: r for r in rows if r["model"]}
    assert {"auto", "ues-4", "fdo"} <= set(models)
    whole = int(models["ues-4"]["parameters"])
    assert all(int(models[m]["parameters"]) <= whole / 2 for m in ("auto", "fdo"))
    assert all(float(r["test_auc"]) > 0 and r["seed"] == "0" for r in models.values())
    # The search's widest model is UES-4: it is measured, not trained again.
    assert models["ues-4"]["stage"] == "widest" and not (out / "retrain" / "ues-4").exists()
    assert max(float(r["peak_gib"] or 0) for r in rows) > 0.2
    assert subprocess.run([*tool, "--out", str(out), "--compare", str(out)], cwd=tmp_path).returncode == 0
