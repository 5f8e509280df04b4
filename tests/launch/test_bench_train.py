"""The training benchmark runs its sides in turn and prints a comparison."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench" / "train.py"
pytestmark = [pytest.mark.launch, pytest.mark.slow]  # every side is a process that loads torch

PEER = """
import torch
class DeepFactorizationMachineModel(torch.nn.Module):
    def __init__(self, field_dims, embed_dim, mlp_dims, dropout):
        super().__init__()
        self.embedding = torch.nn.Embedding(int(sum(field_dims)), embed_dim)
    def forward(self, x):
        return torch.sigmoid(self.embedding(x).sum((1, 2)))
"""


def run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_supernet_beside_a_uniform_model_with_parts_and_ratios() -> None:
    out = run("supernet", "--rows", "3000", "--rounds", "1", "--steps", "2")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [r[0] for r in rows] == [
        "| side",
        "| ---",
        *(f"| {n}" for n in ("UES-64", "UES-64 with transform to 32")),
    ] + ["| supernet, D up to 64, d_f 32"]
    assert rows[2][2] == "1.00" and all(float(r[2]) > 0 for r in rows[2:])
    assert {"look-up ms", "forward ms", "backward ms", "tables ms"} <= set(rows[0])
    ratios = out.splitlines()[-1]
    assert ratios.startswith("supernet / UES-64: embedding part ") and "whole step" in ratios


def test_a_peer_and_two_table_sizes(tmp_path: Path) -> None:
    package = tmp_path / "torchfm" / "model"
    package.mkdir(parents=True)
    (package / "dfm.py").write_text(PEER)
    out = run("size", "--peer", tmp_path, "--rows", "3000", "6000", "--rounds", "1", "--steps", "2")
    assert out.count("| pytorch-fm |") == 2 and out.count("| pytorch-fm, our malloc settings |") == 2
    assert out.count("| embsearch_dist |") == 2
    assert "size: 6,000 rows in all tables" in out
