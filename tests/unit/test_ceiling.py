"""The ceiling: a climb over allocations trained alone, continued where it was stopped, judged by unseen seeds."""

from __future__ import annotations

import argparse
import importlib
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from embsearch_dist.allocation import Allocation
from embsearch_dist.schema import Schema
from embsearch_dist.width_table import FACTS, FIGURES, read_rows

ROOT = Path(__file__).resolve().parents[2]
BEST = {"left": 8, "big": 2, "right": 4, "idle": 0}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("tools.studies.ceiling")


def climb(tool: ModuleType, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, models: int) -> Any:
    """With a training of no time: the nearer to BEST, the better; seeds other than 0 score less."""

    def train(work: tuple[str, str, int, tuple[int, ...]]) -> dict[str, Any]:
        schema = Schema.load(data)
        widths = dict(zip(schema.names, work[3], strict=True))
        score = 0.8 - 0.001 * sum(abs(widths[n] - w) for n, w in BEST.items()) - 0.01 * work[2]
        size = Allocation(schema, widths).total("parameters")
        return {**widths, "seed": work[2], "parameters": size, **dict.fromkeys((*FIGURES, *FACTS), f"{score:.6f}")}

    monkeypatch.setattr(tool, "train", train)
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"method": "adass", "search": {"candidates": [0, 2, 4, 8]}}))
    start = out.with_suffix(".json")
    Allocation(Schema.load(data), dict.fromkeys(BEST, 2)).save(start)
    arguments = {"config": config, "data": data, "start": start, "budget": "20%", "out": out, "models": models}
    found = tool.Climb(argparse.Namespace(**arguments, seed=0, seeds=2, top=2))
    found.run()
    return found


def test_the_climb_finds_the_best_and_goes_on_where_it_was(
    tool: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = climb(tool, data, tmp_path / "a.csv", monkeypatch, 60)
    names = Schema.load(data).names
    assert dict(zip(names, whole.best()[0], strict=True)) == BEST
    assert all(whole.fits(w) for w in whole.best()) and len(whole.trained()) <= 62
    text = capsys.readouterr().out
    assert "| best 1 by validation |" in text and "0.8000 | 0.7850 (0.0071) | 0.7850 (0.0071) |" in text
    climb(tool, data, tmp_path / "b.csv", monkeypatch, 20)
    rows = read_rows(tmp_path / "b.csv")
    # What the judging of 20 has added is there already, so only the climb's own lines say that it went on.
    (tmp_path / "b.csv").write_text("\n".join((tmp_path / "b.csv").read_text().splitlines()[:21]) + "\n")
    climb(tool, data, tmp_path / "b.csv", monkeypatch, 60)
    again, first = (
        [{k: v for k, v in r.items() if k != "command"} for r in read_rows(tmp_path / f"{f}.csv")] for f in "ba"
    )
    assert len(rows) > 20 and [r for r in again if r["seed"] == "0"] == [r for r in first if r["seed"] == "0"]


def test_no_change_leaves_the_budget_and_an_unknown_width_moves_to_a_neighbour(
    tool: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    found = climb(tool, data, tmp_path / "a.csv", monkeypatch, 3)
    steps = {found.change((5, 5, 5, 5), random.Random(k)) for k in range(40)}
    assert {w for s in steps for w in s} == {2, 4, 8}
    assert not found.fits((0, 0, 0, 0)) and not found.fits((8, 8, 8, 8))
