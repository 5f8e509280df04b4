"""Searches by one widest model find on two ranks what they find on one, however the tables are split."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from embsearch_dist.methods import METHODS
from embsearch_dist.methods.stages import run_stages
from tests.factories import one_rank, open_run, prepared, rank_context, small_config
from tests.method_contract import Case
from tests.ranks import run_ranks

SEARCHES = [
    ("utilities", ["search.candidates=[0,2,4,8]", "search.rounds=2", "search.budget=6%"]),
    ("truncation", ["search.rule=fdo", "search.budget=9%"]),
    ("truncation", ["search.rule=magnitude", "search.budget=9%"]),
]


def search(rank: int, world_size: int, data: str, directory: str, sharding: str) -> list[dict[str, Any]]:
    found = []
    for method, overrides in SEARCHES:
        settings = ["search.width=8", f"dist.sharding={sharding}", *overrides]
        run = open_run(small_config(data, directory, *settings, method=method), rank_context(rank, world_size))
        run_stages(METHODS[method](), run)
        found.append(json.loads((Path(directory) / "allocation.json").read_text()))
    return found


def test_two_ranks_find_what_one_finds(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    data = str(prepared(tmp_path_factory))
    one_rank()
    alone = search(0, 1, data, str(tmp_path / "one"), "table_wise")
    both = run_ranks(search, 2, tmp_path, data, str(tmp_path / "two"), "column_wise")
    assert both[0] == both[1]
    for one, two in zip(alone, both[0], strict=True):
        assert two["widths"] == one["widths"]
        for key in ("truncated_auc", "truncated_logloss"):
            assert two["provenance"][key] == pytest.approx(one["provenance"][key], abs=2e-4)


def climb(rank: int, world_size: int, data: str, directory: str) -> dict[str, int]:
    """``auto`` where every wider model is called better, but on rank 1 alone: rank 0 decides."""
    case = Case("auto", data, more=("search.candidates=[1,2,4]", "search.evidence=100"), short=True)
    context = rank_context(rank, world_size)
    run = case.search(directory, context, "search.budget=80%")
    better = SimpleNamespace(first=rank == 0)
    with mock.patch("embsearch_dist.methods.widening.compare", lambda *_: better):
        figures = case.retrain(run.dir, context)
    return {name: int(one["embedding_parameters"]) for name, one in figures.items()}


def test_ranks_agree_on_what_is_trained_wider(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    data = str(prepared(tmp_path_factory))
    both = run_ranks(climb, 2, tmp_path, data, str(tmp_path / "run"))
    assert both[0] == both[1]
    assert [n for n in both[0] if "-x" in n] == ["auto-x2", "auto-x4", "auto-x4-fresh"]
    assert both[0]["auto-x4"] == 4 * both[0]["auto"]
