"""A warm start on two ranks is that of one: whatever the sharding, before and now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embsearch_dist.train.warm.fill import local_parts
from embsearch_dist.train.warm.start import Start
from tests.earlier import STEPS, begun, change, open_run, train, two_days
from tests.factories import one_rank, rank_context, whole_tables
from tests.ranks import run_ranks

NARROW = {"left": 4, "big": 8, "right": 3, "idle": 12}
SHARDED = ["dist.tables={left: column_wise, big: row_wise, right: table_wise, idle: data_parallel}"]


def start(rank: int, world_size: int, data: str, old: str, new: str, *overrides: str) -> dict[str, Any]:
    """What a model begins with: all tables, the moments' sums, the dense part, the record."""
    context = one_rank() if world_size == 1 else rank_context(rank, world_size)
    run = open_run(Path(data), Path(new), context, STEPS, "model.backbone=wide_deep", *overrides)
    task, told, _ = begun(run, NARROW, Start.open(old, optimizer=True))
    adam = task.model.sharded.optimizer_state()["adam"]
    moments = {}
    for name in NARROW:
        found = adam.get(f"embedding_bags.{name}.weight/exp_avg_sq")  # only where a part of it lives
        parts = [] if found is None else [p.double().sum() for _, p in local_parts(found)]
        total = float(context.sum(torch.stack([torch.zeros((), dtype=torch.float64), *parts]).sum()))
        moments[name] = total / (world_size if task.model.sharded.kinds[name] == "data_parallel" else 1)
    return {
        "tables": {n: t.tolist() for n, t in whole_tables(task.model.sharded).items()},
        "head": {n: v.tolist() for n, v in task.model.bare_head.state_dict().items()},
        "moments": moments,
        "told": told,
    }


def test_two_ranks_begin_as_one(tmp_path: Path) -> None:
    first, second = two_days(tmp_path)
    run = open_run(first, tmp_path / "old", one_rank(), STEPS, "model.backbone=wide_deep")
    train(run, 8)
    change(run, 8, lambda task: [s.tensor.mul_(10) for s in task.model.sharded.local_shards()] and None)
    arguments = (str(second), str(run.dir), str(tmp_path / "new"))
    one = start(0, 1, *arguments)
    assert one["told"]["fields"]["left"]["how"] == "turned, cut" and one["told"]["fields"]["idle"]["how"] == "padded"
    for two in run_ranks(start, 2, tmp_path, *arguments, *SHARDED):
        assert two["told"] == one["told"]
        for part in ("tables", "head"):
            for name, value in one[part].items():
                assert two[part][name] == value, name  # the same bits
        assert two["moments"] == pytest.approx(one["moments"], rel=1e-6)


def test_a_training_of_two_ranks_is_begun_with_by_one(tmp_path: Path) -> None:
    first, _ = two_days(tmp_path)
    old = tmp_path / "old"
    run_ranks(_train, 2, tmp_path, str(first), str(old))
    run = open_run(first, tmp_path / "new", one_rank(), STEPS)
    result = train(run, 8, Start.open(old))
    assert result["start"]["step"] == 3 and result["auc"] > 0


def _train(rank: int, world_size: int, data: str, old: str) -> None:
    train(open_run(Path(data), Path(old), rank_context(rank, world_size), STEPS, *SHARDED), 8)
