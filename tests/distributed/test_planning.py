"""The planner's plan trains as the plan by hand does, and what fails on one rank fails on all at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig, PlannerConfig
from embsearch_dist.sharding import placing
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import STAGE, SubnetTask
from embsearch_dist.train.trainer import Trainer
from tests.factories import (
    open_run,
    prepared,
    random_batch,
    rank_context,
    recorded,
    small_config,
    small_schema,
    streams,
    whole_tables,
)
from tests.ranks import run_ranks

SCHEMA = small_schema(9000, 4100, 30)
TABLES = [Table("f0", 9000, 8), Table("f1", 4100, 12), Table("f2", 30, 4)]
PLANNER = ["dist.sharding=planner", "dist.planner.column_width=4"]


def fit(rank: int, world_size: int, data: str, directory: str, overrides: list[str]) -> dict[str, str]:
    config = small_config(data, directory, "train.steps=8", *overrides)
    run = open_run(config, rank_context(rank, world_size))
    task = SubnetTask(config, Allocation.uniform(run.schema, 8), run.context)
    with Monitor(directory, STAGE, rank, quiet=True) as monitor:
        root = Path(directory, "checkpoints")
        Trainer(task, config.train, config.optim, *streams(run), run.context, monitor, root).fit()
    return task.model.sharded.kinds


def fit_many(rank: int, world_size: int, data: str, folder: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    return {name: fit(rank, world_size, data, f"{folder}/{name}", overrides) for name, overrides in cases.items()}


def test_training_on_the_planners_plan_has_the_losses_of_the_plan_by_hand(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases: dict[str, list[str]] = {}
    told = [*PLANNER, "dist.tables={big: row_wise, left: column_wise, idle: data_parallel}"]
    for optimizer in ("adam", "adagrad"):
        own = [f"optim.embedding={optimizer}"]
        cases |= {f"{optimizer}-hand": own, f"{optimizer}-told": [*own, *told]}
    cases["adam-planner"] = ["optim.embedding=adam", *PLANNER]
    first, second = run_ranks(fit_many, 2, tmp_path, str(prepared(tmp_path_factory)), str(tmp_path), cases)
    assert first == second
    for optimizer in ("adam", "adagrad"):
        kinds = first[f"{optimizer}-told"]
        assert (kinds["big"], kinds["left"], kinds["idle"]) == ("row_wise", "column_wise", "data_parallel")
        losses = {name: recorded(tmp_path / name, STAGE, "loss") for name in cases if name.startswith(optimizer)}
        for name, found in losses.items():
            assert len(found) == 8
            assert found == pytest.approx(losses[f"{optimizer}-hand"], abs=2e-5), name
        assert losses[f"{optimizer}-hand"][-1] < losses[f"{optimizer}-hand"][0]


def step_tables(rank: int, world_size: int, cases: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A few steps on machines of two ranks each: kinds, this rank's shapes, a sum over each whole table."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = []
    for kinds in cases:
        dist = DistConfig(sharding="planner", tables=kinds, planner=PlannerConfig(column_width=4))
        tables = ShardedTables(TABLES, rank_context(rank, world_size), dist, OptimConfig(embedding="adagrad"), 3, 0.1)
        for step in range(3):
            pooled = tables(random_batch(SCHEMA, 32, seed=10 * step + rank).sparse)
            sum(v.square().sum() for v in pooled.to_dict().values()).backward()  # type: ignore[union-attr]
            tables.step()
        sums = {n: t.double().abs().sum().item() for n, t in whole_tables(tables).items()}
        shapes = {s.table.name: [*s.tensor.shape, s.row_offset, s.column_offset] for s in tables.local_shards()}
        found.append({"kinds": tables.kinds, "shapes": shapes, "sums": sums})
    return found


def test_sharding_over_two_machines_trains_alike(tmp_path: Path) -> None:
    whole = {"f0": "table_wise", "f1": "table_wise", "f2": "table_wise"}
    cases = [whole, whole | {"f0": "table_row_wise", "f1": "row_wise"}, whole | {"f0": "grid_shard"}]
    ranks = run_ranks(step_tables, 4, tmp_path, cases)
    for rank in ranks:
        assert [c["kinds"] for c in rank] == [whole, cases[1] | {"f1": "row_wise"}, cases[2]]
        for case in rank[1:]:
            assert case["sums"] == pytest.approx(rank[0]["sums"], rel=1e-6)
    assert sorted(r[1]["shapes"]["f0"] for r in ranks if "f0" in r[1]["shapes"]) == [
        [4500, 8, 0, 0],
        [4500, 8, 4500, 0],
    ]
    assert sorted(r[2]["shapes"]["f0"] for r in ranks) == [[4500, 4, r, c] for r in (0, 4500) for c in (0, 4)]


def fail(rank: int, world_size: int, make: Callable[[int], ShardedTables]) -> dict[str, Any]:
    begin, text = time.monotonic(), "no error"
    try:
        make(rank)
    except Exception as e:
        text = str(e)
    context = rank_context(rank, world_size)
    total = float(context.sum(torch.ones(1)))  # the group still works
    return {"text": text, "seconds": time.monotonic() - begin, "sum": total}


def fail_all_ways(rank: int, world_size: int) -> list[dict[str, Any]]:
    context = rank_context(rank, world_size)

    def tables(found: list[Table], dist: DistConfig) -> ShardedTables:
        return ShardedTables(found, context, dist, OptimConfig(), 0, 0.1)

    planner = DistConfig(sharding="planner", planner=PlannerConfig(ddr_gb=0.0005))
    other = [Table("f0", 9000 + rank, 8), *TABLES[1:]]
    odd = [Table("f0", 9000, 8 - 2 * rank)]
    results = [
        fail(rank, world_size, lambda _: tables(TABLES, planner)),
        fail(rank, world_size, lambda _: tables(other, DistConfig())),
        fail(rank, world_size, lambda _: tables(TABLES[: 3 - rank], DistConfig())),
        fail(rank, world_size, lambda _: tables(odd, DistConfig())),
    ]
    whole = placing.ShardedEmbeddingBagCollection._create_lookups

    def no_memory(self: Any) -> None:
        if rank == 1:
            raise RuntimeError("out of memory")
        whole(self)

    # Data-parallel tables are the hard case: TorchRec's constructor calls collectives for them.
    placing.ShardedEmbeddingBagCollection._create_lookups = no_memory
    for sharding in ("row_wise", "data_parallel"):
        results.append(fail(rank, world_size, lambda _, s=sharding: tables(TABLES, DistConfig(sharding=s))))
    placing.ShardedEmbeddingBagCollection._create_lookups = whole
    results.append(fail(rank, world_size, lambda _: tables(TABLES, DistConfig(sharding="data_parallel"))))
    return results


def test_what_fails_on_one_rank_fails_on_both_within_seconds(tmp_path: Path) -> None:
    first, second = run_ranks(fail_all_ways, 2, tmp_path)
    infeasible, rows, count, width, wise, parallel, fine = zip(first, second, strict=True)
    assert infeasible[0]["text"].startswith("no plan for 2 ranks with 524 KiB DDR each")
    assert infeasible[1]["text"] == f"rank 0 failed while planning the tables: {infeasible[0]['text']}"
    assert rows[1]["text"].startswith(
        "rank 1 has table 'f0' of 9,001 rows x 8, rank 0 has table 'f0' of 9,000 rows x 8"
    )
    assert rows[0]["text"] == f"rank 1 failed while checking the tables: {rows[1]['text']}"
    assert count[1]["text"].startswith("rank 1 has 2 tables, rank 0 has 3 tables: every rank must read the same")
    assert "table 'f0': physical width 6 is not a positive multiple of 4" in width[0]["text"]
    for case in (wise, parallel):
        assert case[1]["text"] == "out of memory"
        assert case[0]["text"] == "rank 1 failed while placing the tables: RuntimeError('out of memory')"
    assert [f["text"] for f in fine] == ["no error"] * 2
    for found in (*first, *second):
        assert found["sum"] == 2
        assert found["seconds"] < 10
