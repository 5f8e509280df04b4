"""Tables with rows for some values alone learn on two ranks, however they are sharded, what they learn on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embsearch_dist.allocation import Allocation
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.train.retrain import SubnetTask
from tests.factories import open_run, prepared, rank_context, small_config, train_and_measure
from tests.ranks import run_ranks

KINDS = ("auto", "row_wise", "data_parallel")


def train(rank: int, world_size: int, data: str, directory: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    found = []
    for kind in kinds:
        config = small_config(data, directory, f"dist.sharding={kind}", "train.epochs=1")
        run = open_run(config, rank_context(rank, world_size))
        size = dict(zip(run.schema.names, run.schema.cardinalities, strict=True))
        rng = np.random.default_rng(0)
        values = {
            "big": KeptValues.of(rng.random(size["big"]) < 0.8),
            "left": KeptValues.of(rng.random(size["left"]) < 0.5),
        }
        allocation = Allocation(run.schema, {"left": 4, "big": 4, "right": 8, "idle": 0}, values=values)
        task = SubnetTask(run.config, allocation, run.context)
        assert task.model.sharded.tables["big"].rows == values["big"].rows > 2048
        found.append(train_and_measure(run, task, f"{directory}/{kind}"))
    return found


def test_two_ranks_learn_what_one_does(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    data = str(prepared(tmp_path_factory))
    alone = run_ranks(train, 1, tmp_path, data, str(tmp_path / "one"), KINDS[:1], timeout=300)[0][0]
    both = run_ranks(train, 2, tmp_path, data, str(tmp_path / "two"), KINDS, timeout=300)
    assert [found["kinds"]["big"] for found in both[0]] == ["row_wise", "row_wise", "data_parallel"]
    for found in (f for rank in both for f in rank):
        assert found["metrics"]["auc"] == pytest.approx(alone["metrics"]["auc"], abs=1e-3)
        assert found["tables"] == pytest.approx(alone["tables"], rel=1e-3)
