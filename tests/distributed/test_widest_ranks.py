"""Searches by one widest model find on two ranks what they find on one, however the tables are split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from embsearch_dist.data.load.batch import Batch, Position
from embsearch_dist.data.load.making import BatchMaker
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.stages import run_stages
from embsearch_dist.methods.widest import Repeats
from tests.factories import one_rank, open_run, prepared, rank_context, small_config, small_schema
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


def repeats(rank: int, world_size: int) -> list[float]:
    """How often ids of five fields come again, of 3,000 rows drawn from 6,000 and split over the ranks.

    Users have six rows each, orders one; the third field holds one known value, the fourth none, the last is unknown in
    some rows."""
    rows = 6000
    schema = small_schema(1001, rows + 1, 2, 2, 501)
    places = torch.randperm(rows, generator=torch.Generator().manual_seed(2))[:3000]
    own = places[rank * 1000 : 3000 if rank == world_size - 1 else rank * 1000 + 1000]  # ranks of unequal parts
    ids = torch.stack([own % 1000 + 1, own + 1, own % 2, own * 0, own % 7 * (own % 500 + 1) // 6]).int()
    counts = Repeats(schema.names)
    for part in ids.split(500, 1):
        size = part.shape[1]
        batch = Batch(torch.zeros(size, 0), BatchMaker(schema).sparse(part), torch.zeros(size), Position(0, 1))
        list(counts.watch(iter([batch])))
    return counts.again(rows, rank_context(rank, world_size)).tolist()


@pytest.mark.parametrize("ranks", [2, 3])
def test_how_often_ids_come_again_does_not_depend_on_how_many_ranks_there_are(ranks: int, tmp_path: Path) -> None:
    alone = repeats(0, 1)
    assert alone[:3] == pytest.approx([5, 0, 2999], rel=0.1) and math.isnan(alone[3])
    for told in run_ranks(repeats, ranks, tmp_path):
        assert told == pytest.approx(alone, rel=1e-12, nan_ok=True)


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
