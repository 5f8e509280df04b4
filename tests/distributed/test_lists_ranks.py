"""List fields on two ranks: every sharding pools alike, trains as one rank does, and prepare gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.data.formats import blocks
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.data.prepare.team import from_environment
from embsearch_dist.methods.adass.scored_rows import make_scorer
from embsearch_dist.methods.adass.supernet_stage import SupernetTask
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from embsearch_dist.train.retrain import SubnetTask
from embsearch_dist.train.task import Task
from tests.factories import open_run, rank_context, recorded, small_config, train_and_measure, whole_tables
from tests.ranks import run_ranks
from tests.raw_clicks import OPTIONS, digest
from tests.raw_lists import list_schema, make_lists, plain_pooled, prepared_lists, random_lists

# (sharding, optimizer) of each training on two ranks.
PAIRS = [
    ("table_wise", "adam"),
    ("row_wise", "adam"),
    ("row_wise", "rowwise_adagrad"),
    ("column_wise", "adagrad"),
    ("data_parallel", "adam"),
    ("planner", "adam"),
]
SHARDINGS = ["auto", "table_wise", "row_wise", "column_wise", "data_parallel", "planner"]


def pool(rank: int, world_size: int, weighted: bool) -> list[list[float]]:
    """The largest differences of values and of gradients from plain torch, per sharding; rank 1 has no ``sum``."""
    found = []
    schema = list_schema(3000, weighted)
    for sharding in SHARDINGS:
        tables = [Table.of(f, 8) for f in schema.fields]
        context, optim = rank_context(rank, world_size), OptimConfig(embedding="sgd", embedding_lr=1.0)
        sharded = ShardedTables(tables, context, DistConfig(sharding=sharding), optim, 0, 0.5)
        before = whole_tables(sharded)
        batches = [random_lists(schema, 24, seed, "sum" if seed else "") for seed in range(world_size)]
        leaves = {n: t.clone().requires_grad_() for n, t in before.items()}
        pooled = sharded(batches[rank].sparse).to_dict()
        plain = {f.name: [plain_pooled(leaves[f.name], f, b) for b in batches] for f in schema.fields}
        values = max(float((pooled[n] - plain[n][rank]).abs().max()) for n in plain)  # type: ignore[union-attr]
        # TorchRec averages the gradients of the ranks.
        sum(p.pow(2).sum() for p in pooled.values()).backward()
        (sum(p.pow(2).sum() for all_ranks in plain.values() for p in all_ranks) / world_size).backward()  # type: ignore[union-attr]
        sharded.step()
        after = whole_tables(sharded)
        steps = max(float((after[n] - (before[n] - leaves[n].grad)).abs().max()) for n in plain)  # type: ignore[operator]
        moved = min(float((after[n] - before[n]).abs().max()) for n in plain)
        found.append([values, steps, moved])
    return found


@pytest.mark.parametrize("weighted", [True, False])
def test_every_sharding_pools_as_plain_torch(tmp_path: Path, weighted: bool) -> None:
    for rank in run_ranks(pool, 2, tmp_path, weighted):
        for sharding, (values, steps, moved) in zip(SHARDINGS, rank, strict=True):
            assert values < 3e-6 and steps < 2e-5 and moved > 0.1, (sharding, values, steps, moved)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(prepared_lists(tmp_path_factory.mktemp("lists")))


def train(rank: int, world_size: int, data: str, directory: str, kind: str, *overrides: str) -> dict[str, Any]:
    config = small_config(data, directory, "train.steps=10", *overrides)
    run = open_run(config, rank_context(rank, world_size))
    allocation = Allocation(run.schema, {"user": 0, "tags": 6, "likes": 8, "big": 8})
    task: Task = SupernetTask(run) if kind == "supernet" else SubnetTask(config, allocation, run.context)
    return train_and_measure(run, task, directory)


def train_many(rank: int, world_size: int, data: str, directory: str, cases: list[list[str]]) -> list[dict[str, Any]]:
    return [train(rank, world_size, data, f"{directory}/{i}", *case) for i, case in enumerate(cases)]


def test_two_ranks_train_as_one_and_again_bitwise(tmp_path: Path, data: str) -> None:
    optimizers = sorted({o for _, o in PAIRS})
    alone = [["subnet", f"optim.embedding={o}"] for o in optimizers] + [["supernet"]]
    shared = [["subnet", f"dist.sharding={s}", f"optim.embedding={o}"] for s, o in PAIRS]
    shared.append(["supernet", "dist.sharding=row_wise"])
    ones = run_ranks(train_many, 1, tmp_path, data, str(tmp_path / "one"), alone)[0]
    twos = run_ranks(train_many, 2, tmp_path, data, str(tmp_path / "two"), [*shared, shared[1], shared[-1]])
    assert twos[0] == twos[1]
    for i, (sharding, optimizer) in enumerate([*PAIRS, ("row_wise", "supernet")]):
        k = optimizers.index(optimizer) if optimizer in optimizers else -1
        one, two = ones[k], twos[0][i]
        folder = len(alone) - 1 if k == -1 else k
        losses = [recorded(d, "fit", "loss") for d in (tmp_path / "one" / str(folder), tmp_path / "two" / str(i))]
        assert len(losses[0]) == 10, sharding
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
        assert two["metrics"]["rows"] == one["metrics"]["rows"]
        assert two["metrics"]["auc"] == pytest.approx(one["metrics"]["auc"], abs=1e-4)
        assert two["tables"] == pytest.approx(one["tables"], rel=1e-3)
        if sharding != "planner":
            assert two["kinds"]["big"] == sharding
    for i, again in ((1, len(shared)), (len(shared) - 1, len(shared) + 1)):
        assert twos[0][again] == twos[0][i]
        folders = [tmp_path / "two" / str(x) for x in (i, again)]
        assert recorded(folders[0], "fit", "loss") == recorded(folders[1], "fit", "loss")


def score_subnets(rank: int, world_size: int, data: str, directory: str) -> list[dict[str, float]]:
    run = open_run(small_config(data, directory), rank_context(rank, world_size))
    scorer = make_scorer(run, SupernetTask(run))
    return scorer.score(torch.tensor([[a, b, (a + b) % 4, 3 - a] for a in range(4) for b in range(4)]))


def test_subnets_of_lists_score_alike_on_one_rank_and_two(tmp_path: Path, data: str) -> None:
    one = run_ranks(score_subnets, 1, tmp_path, data, str(tmp_path / "run"))[0]
    two = run_ranks(score_subnets, 2, tmp_path, data, str(tmp_path / "run"))
    assert two[0] == two[1]
    for a, b in zip(one, two[0], strict=True):
        assert a["rows"] == b["rows"]
        assert b["auc"] == pytest.approx(a["auc"], abs=2e-4)
        assert b["logloss"] == pytest.approx(a["logloss"], rel=1e-5)


def work(rank: int, world_size: int, source: str, out: str) -> dict[str, int]:
    blocks.BLOCK_BYTES = 3000
    return prepare("table", source, out, team=from_environment(), **OPTIONS).rows


def test_any_number_of_processes_prepares_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = make_lists(tmp_path)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    schema = prepare("table", source, tmp_path / "one", **OPTIONS)
    found = run_ranks(work, 2, tmp_path, str(source), str(tmp_path / "two"), init=False)
    assert found == [schema.rows] * 2
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
