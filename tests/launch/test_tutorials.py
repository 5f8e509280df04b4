"""The tutorials as a newcomer runs them: each in an empty folder, offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "examples").glob("*.py"))


def run(tutorial: Path, folder: Path) -> str:
    """What it prints; it must end well."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tutorial)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # each takes about a minute of two idle cores
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_an_empty_folder_and_its_model_has_learned(tutorial: Path, tmp_path: Path) -> None:
    told = run(tutorial, tmp_path)
    areas = [float(text) for text in re.findall(r"test AUC (0\.\d+)", told)]
    assert areas and min(areas) > 0.7, told[-500:]
    rows = re.findall(r"^\S+: ([\d,]+) parameters, test AUC (0\.\d+)", told, re.MULTILINE)  # what was found comes first
    if rows:
        sizes, qualities = [int(n.replace(",", "")) for n, _ in rows], [float(auc) for _, auc in rows]
        assert sizes[0] == min(sizes) and qualities[0] > max(qualities) - 0.01
    assert {path.name for path in tmp_path.iterdir()} >= {"clicks.csv", "source.yaml", "data", "run"}
