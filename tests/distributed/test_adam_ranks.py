"""Adam of the tables over ranks: every sharding moves the rows that any rank has looked up, as one process would."""

from __future__ import annotations

import pytest
import torch

from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.kernels.adam import moved, numbers
from embsearch_dist.sharding.sharded_tables import ShardedTables, Table
from tests.factories import random_batch, rank_context, small_schema, whole_tables
from tests.ranks import run_ranks

SCHEMA = small_schema(4000, 2100, 30)
TABLES = [Table("f0", 4000, 8), Table("f1", 2100, 16), Table("f2", 30, 8)]
KINDS = ["table_wise", "row_wise", "column_wise", "data_parallel", "planner"]
STEPS, ROWS, LR = 4, 24, 0.05


def closed(step: int, name: str) -> torch.Tensor | float:
    """A mask on a field's columns: in step 2 f1 has a gradient of zeros, in step 3 half of f0's columns has."""
    if step == 3 and name == "f0":
        return (torch.arange(8) < 4).float()
    return 0.0 if (step, name) == (2, "f1") else 1.0


def train(rank: int, world_size: int, kind: str, partial: bool) -> list[float]:
    """Over all steps: the largest difference from one process, and how many rows that nobody looked up have moved."""
    context, config = rank_context(rank, world_size), OptimConfig(embedding_lr=LR)
    tables = ShardedTables(TABLES, context, DistConfig(sharding=kind), config, 0, 0.3, partial)
    if kind != "planner":
        assert kind in tables.kinds.values()
    expected = whole_tables(tables)
    moments = {n: (torch.zeros_like(t), torch.zeros_like(t)) for n, t in expected.items()}
    worst, strays = 0.0, 0
    for step in range(1, STEPS + 1):
        before = whole_tables(tables)
        batches = [random_batch(SCHEMA, ROWS, 10 * step + r) for r in range(world_size)]
        if step == 4:  # a step that does not count, on rows that have momentum
            tables(random_batch(SCHEMA, ROWS, 10 + rank).sparse)
            tables.zero_grad()
        pooled = tables(batches[rank].sparse)
        sum((pooled[n].pow(2) * closed(step, n)).sum() for n in SCHEMA.names).backward()  # type: ignore[union-attr]
        tables.step()
        tables.zero_grad()
        after = whole_tables(tables)
        for name, w in expected.items():
            ids = torch.cat([b.sparse[name].values().long() for b in batches])
            gradient = torch.zeros_like(w).index_add_(0, ids, 2 * w[ids] * closed(step, name) / world_size)
            seen = torch.zeros(len(w), 1, dtype=torch.bool).index_fill_(0, ids, True)
            expected[name], *pair = moved(w, *moments[name], gradient, numbers(step, LR, partial), seen)
            moments[name] = (pair[0], pair[1])
            worst = max(worst, float((after[name] - expected[name]).abs().max()))
            strays += int((after[name] != before[name]).any(1)[~seen[:, 0]].sum())
            still = (step, name) == (2, "f1") and partial
            assert torch.equal(after[name], before[name]) == still, (step, name)
    assert tables.adam is not None
    return [worst, strays, int(tables.adam.steps)]


def train_all(rank: int, world_size: int) -> list[list[float]]:
    return [train(rank, world_size, kind, partial) for kind in KINDS for partial in (False, True)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[float]]]:
    return run_ranks(train_all, 2, tmp_path_factory.mktemp("adam"))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_step_as_one_process_whatever_the_sharding(
    results: list[list[list[float]]], kind: str, partial: bool
) -> None:
    for rank in results:
        worst, strays, steps = rank[2 * KINDS.index(kind) + partial]
        assert worst < 1e-5
        assert strays == 0
        assert steps == STEPS
