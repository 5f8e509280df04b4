"""The training that the tests of this folder start everywhere, and what came out of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from embsearch_dist.train.manifest import read_manifest
from tests.factories import command_line

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
OVERRIDES = [f"train.steps={STEPS}", "train.save_every=4", "train.patience=0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def arguments(data: Path, config: Path, run: Path, *overrides: str) -> list[str]:
    """Of retrain.py. Each key once: TorchX takes no option twice."""
    chosen = dict(word.split("=", 1) for word in [*OVERRIDES, *overrides])
    own = [f"{key}={value}" for key, value in chosen.items()]
    given = dict(word.split("=", 1) for word in command_line(data, run, *own))
    return ["--config", str(config), "--allocation", "ues-8", *(f"{key}={value}" for key, value in given.items())]


def result(run: Path) -> dict[str, Any]:
    """The model's worth, and a checksum of every weight and all optimizer state."""
    own = run / "retrain" / "ues-8"
    files = read_manifest(own / "checkpoints" / "retrain" / f"step-{STEPS}")["files"]
    test = json.loads((own / "evaluation.json").read_text())
    tensors = {name: facts for name, facts in files.items() if name.endswith(".distcp")}
    assert len(tensors) == 2
    return {"test": (test["auc"], test["logloss"]), "tensors": tensors}
