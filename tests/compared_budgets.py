"""Finished runs as the comparison at equal budgets finds them, without any training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import write_json
from tests.factories import small_schema

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "synthetic" / "adass_deepfm.yaml"
SCHEMA = small_schema(60, 30, 10)
FOUND = {"f0": 6, "f1": 8, "f2": 2}  # 620 parameters, 19% of UES-32


def call(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str, config: Path = CONFIG) -> None:
    """The tool with two seeds, two budgets and two uniform widths, which ``arguments`` may change."""
    words = ["--config", str(config), "--data", "DATA", "--out", str(out), "--seeds", "2", "--widths", "4,8"]
    monkeypatch.setattr(sys, "argv", ["compare_budgets.py", *words, "--budgets", "20%,50%", *arguments])
    tool.main()


def searched(out: Path, seed: int, method: str, budget: str, widths: dict[str, int]) -> None:
    """What a search of a method has left."""
    folder = method if method in ("adass", "random") else "widest"
    name = method if budget == "20%" else f"{method}-{budget.replace('%', 'pct')}"
    file = out / f"seed{seed}" / folder / "allocations" / f"{name}.json"
    Allocation(SCHEMA, widths, {"budget": budget}).save(file)


def trained(
    out: Path, seed: int, name: str, widths: dict[str, int], auc: float, served: dict[str, object] | None = None
) -> None:
    """A finished training: ``auc`` is that of the test split."""
    place = out / f"seed{seed}" / "models" / "retrain" / (name if seed == 0 else f"{name}-seed{seed}")
    size = Allocation(SCHEMA, widths).total("parameters")
    body = {"auc": auc, "logloss": 0.5, "embedding_parameters": size, "widths": widths, "backbone": "deepfm"}
    body |= {"served": served} if served else {}
    SCHEMA.save(place)
    Allocation(SCHEMA, widths).save(place / "allocation.json")
    write_json(place / "evaluation.json", body)
    write_json(place / "training.json", {"seconds": 12.34, "best_step": 20})
    lines = [{"step": s, "split": "validation", "auc": auc + 0.001 * s, "logloss": 0.4} for s in (10, 20, 30)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
