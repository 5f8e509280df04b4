"""Routed models, their router of fields and what they inherit: two ranks as one, however the rows are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.dataset import read_rows
from embsearch_dist.data.load.select import select
from embsearch_dist.methods.ihas import retraining
from embsearch_dist.methods.ihas.retraining import inherit
from embsearch_dist.methods.ihas.routed_model import RoutedModel, agreement, measure
from embsearch_dist.methods.ihas.router_by_fields import FIELD_ROUTER, fit_field_router
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from tests.factories import open_run, prepared, random_batch, rank_context, small_config, small_schema, whole_tables
from tests.ranks import run_ranks
from tests.raw_lists import list_schema, random_lists

ROWS = 32
SHARDINGS = ["table_wise", "row_wise", "column_wise", "data_parallel", "planner"]
PLAIN = small_schema(5000, 30, 20)
PLAIN_WIDTHS = [{"f0": 8, "f1": 0, "f2": 8}, {"f0": 4, "f1": 0, "f2": 0}, {"f0": 0, "f1": 0, "f2": 4}]
LISTS = list_schema(5000)
LIST_WIDTHS = [
    {"one": 4, "mean": 8, "sum": 4, "scaled": 2},
    {"one": 0, "mean": 4, "sum": 0, "scaled": 8},
    {"one": 4, "mean": 0, "sum": 4, "scaled": 0},
]
# Where the rows of the first half and of the second go: on two ranks these are rank 0 and rank 1.
SPREADS = {
    "each rank its own group": [0] * 16 + [1] * 16,
    "one row beside fifteen": [0] * 15 + [1] + [1] * 15 + [0],
    "nobody in two groups": [2] * 32,
    "mixed": np.random.default_rng(0).integers(0, 3, ROWS).tolist(),
}


class Given:
    """Sends the rows where it was told, whatever they hold."""

    def __init__(self, groups: torch.Tensor) -> None:
        self.groups = groups

    def assign(self, batch: Batch) -> torch.Tensor:
        return self.groups[: batch.size]

    def parameters(self) -> int:
        return 0

    def flops_per_sample(self) -> float:
        return 0.0


def models_of(schema: Schema, widths: list[dict[str, int]], context: Context, sharding: str) -> list[SubnetModel]:
    found = []
    for seed, own in enumerate(widths):
        config = small_config("none", "none", f"run.seed={seed}", "model.init_std=1", f"dist.sharding={sharding}")
        found.append(SubnetModel(config, Allocation(schema, own), context).eval())
    return found


def predict(rank: int, world_size: int, shardings: list[str]) -> dict[str, list[float]]:
    """Logits of one global batch under each spread of its rows over groups, by sharding, kind of data and spread."""
    context, found = rank_context(rank, world_size), {}
    mine = torch.arange(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    for sharding in shardings:
        for schema, widths in ((PLAIN, PLAIN_WIDTHS), (LISTS, LIST_WIDTHS)):
            models = models_of(schema, widths, context, sharding)
            whole = random_batch(schema, ROWS) if schema is PLAIN else random_lists(schema, ROWS)
            batch = select(whole, mine)
            for name, groups in SPREADS.items():
                model = RoutedModel(Given(torch.tensor(groups)[mine]), models, schema, context)
                found[f"{sharding}, {schema.dataset}, {name}"] = context.gather(model(batch)).tolist()
    return found


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    one = run_ranks(predict, 1, tmp_path, ["table_wise"])[0]
    two = run_ranks(predict, 2, tmp_path, SHARDINGS)
    assert two[0] == two[1]
    assert len(two[0]) == len(SHARDINGS) * len(one)
    for name, logits in two[0].items():
        wanted = one[f"table_wise,{name.split(',', 1)[1]}"]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len({round(x, 4) for x in one["table_wise, small, mixed"]}) > ROWS / 2


class LeftRouter(Given):
    """Group 1 for small ids of ``left``."""

    def __init__(self) -> None:
        pass

    def assign(self, batch: Batch) -> torch.Tensor:
        return (batch.sparse["left"].values() < 4).long()


TINY = [{"left": 4, "big": 2, "right": 8, "idle": 0}, {"left": 8, "big": 0, "right": 4, "idle": 0}]


def look(rank: int, world_size: int, data: str, directory: str) -> dict[str, Any]:
    """A pass over the test split, and the router of fields fitted to a rule."""
    context = rank_context(rank, world_size)
    run = open_run(small_config(data, directory, method="ihas"), context)

    def teach() -> None:
        run.schema.save(run.dir)
        folder = run.dir / "groups" / "assignment"
        folder.mkdir(parents=True)
        for split in run.schema.rows:
            ids = dict(zip(run.schema.names, read_rows(data, run.schema, split)[0].numpy()))
            np.save(folder / f"{split}.npy", ((ids["left"] % 3) + (ids["right"] % 2) >= 2).astype(np.uint8))

    context.first("teaching", teach)
    model = RoutedModel(LeftRouter(), models_of(run.schema, TINY, context, "row_wise"), run.schema, context)
    found = measure(model, run.stream("test", 150, shuffle=False).epoch(0), context)
    router = fit_field_router(run, 2)
    return {
        "logits": found.logits.tolist(),
        "labels": found.labels.tolist(),
        "groups": found.groups.tolist(),
        "agreement": agreement(found.groups, run, "test"),
        "fields": list(router.tables),
    }


def test_figures_and_the_router_of_fields_do_not_depend_on_the_ranks(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = str(prepared(tmp_path_factory))
    one = run_ranks(look, 1, tmp_path, data, str(tmp_path / "one"))[0]
    two = run_ranks(look, 2, tmp_path, data, str(tmp_path / "two"))
    assert two[0] == two[1]
    for key in ("labels", "groups", "agreement", "fields"):
        assert two[0][key] == one[key]
    np.testing.assert_allclose(two[0]["logits"], one["logits"], rtol=1e-4, atol=1e-5)
    assert 0 < one["agreement"] < 1
    files = [sorted((tmp_path / name / FIELD_ROUTER).parent.glob("field_router*")) for name in ("one", "two")]
    assert len(files[0]) == len(one["fields"]) + 1 >= 3
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


COLUMNS = {"f0": [0, 2, 3, 5, 6, 7], "f1": [1], "f2": [0, 1, 2, 3, 4, 5, 6, 7]}
PAIRS = [
    ("table_wise", "row_wise"),
    ("row_wise", "column_wise"),
    ("column_wise", "data_parallel"),
    ("data_parallel",) * 2,
]


def tables_of(width: dict[str, int], seed: int, sharding: str, context: Context) -> ShardedTables:
    tables = [Table.of(f, width[f.name]) for f in PLAIN.fields]
    return ShardedTables(tables, context, DistConfig(sharding=sharding), OptimConfig(), seed, 1.0)


def hand_down(rank: int, world_size: int) -> None:
    """For each pair of shardings: the kept columns come over, the rest stays as it was."""
    context = rank_context(rank, world_size)
    retraining.BLOCK_ROWS = 1500  # f0 has 5000 rows: blocks that end inside a rank's part
    columns = {name: torch.tensor(own) for name, own in COLUMNS.items()}
    for before, after in PAIRS:
        base = tables_of(dict.fromkeys(PLAIN.names, 8), 0, before, context)
        into = tables_of({"f0": 8, "f1": 4, "f2": 8}, 1, after, context)
        source, old = whole_tables(base), whole_tables(into)
        inherit(base, into, columns, context)
        for name, new in whole_tables(into).items():
            width = len(COLUMNS[name])
            assert torch.equal(new[:, :width], source[name][:, columns[name]]), (before, after, name)
            assert torch.equal(new[:, width:], old[name][:, width:]), (before, after, name)
    if rank == 0:
        assert {into.kinds["f0"], base.kinds["f0"]} == {"data_parallel"}


def test_columns_are_inherited_between_all_shardings(tmp_path: Path) -> None:
    run_ranks(hand_down, 2, tmp_path)
