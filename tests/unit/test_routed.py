"""The models of all groups as one: order, groups without rows, lists, figures; and what group models inherit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.allocation import Allocation
from embsearch_dist.config.sections import DistConfig, OptimConfig
from embsearch_dist.data.load.batch import Batch
from embsearch_dist.data.load.select import select
from embsearch_dist.errors import UserError
from embsearch_dist.files import write_json
from embsearch_dist.grouped import GroupedAllocation
from embsearch_dist.methods.ihas.retraining import inherit, read_kept
from embsearch_dist.methods.ihas.routed_model import (
    RoutedModel,
    evaluate_routed,
    measure,
    open_router,
    router_tables,
    stored_places,
)
from embsearch_dist.methods.ihas.router_by_fields import FieldRouter
from embsearch_dist.methods.retraining import evaluation_file
from embsearch_dist.models.model import SubnetModel
from embsearch_dist.ranks.context import Context
from embsearch_dist.run import Run
from embsearch_dist.schema import Schema
from embsearch_dist.sharding.sharded_tables import ShardedTables
from embsearch_dist.sharding.tables import Table
from embsearch_dist.train.measures import areas_by_group
from embsearch_dist.train.metrics import auc
from tests.factories import one_rank, open_run, prepared, random_batch, small_config, small_schema, whole_tables
from tests.raw_lists import list_schema, random_lists

SCHEMA = small_schema(40, 30, 20)
WIDTHS = [{"f0": 4, "f1": 0, "f2": 8}, {"f0": 2, "f1": 0, "f2": 0}, {"f0": 0, "f1": 0, "f2": 4}]  # f1 is in none


class Given:
    """Sends the rows where it was told, whatever they hold."""

    def __init__(self, groups: list[int]) -> None:
        self.groups = torch.tensor(groups)

    def assign(self, batch: Batch) -> torch.Tensor:
        return self.groups[: batch.size]

    def parameters(self) -> int:
        return 7

    def flops_per_sample(self) -> float:
        return 1000.0


def models_of(schema: Schema, widths: list[dict[str, int]]) -> list[SubnetModel]:
    """One model per allocation, each from a seed of its own, with weights large enough to tell them apart."""
    found = []
    for seed, own in enumerate(widths):
        config = small_config("none", "none", f"run.seed={seed}", "model.init_std=1")
        found.append(SubnetModel(config, Allocation(schema, own), one_rank()).eval())
    return found


def routed(groups: list[int], widths: list[dict[str, int]] = WIDTHS, schema: Schema = SCHEMA) -> RoutedModel:
    return RoutedModel(Given(groups), models_of(schema, widths), schema, one_rank())


@torch.no_grad()
def row_by_row(model: RoutedModel, batch: Batch, groups: list[int]) -> torch.Tensor:
    """Each row alone, by the model of its group."""
    return torch.cat([model.subnets[g](select(batch, torch.tensor([r])))[0] for r, g in enumerate(groups)])


@pytest.mark.parametrize(
    "groups",
    [
        np.random.default_rng(0).integers(0, 3, 32).tolist(),
        [2, *[0] * 30, 2],  # nobody in group 1
        [1] * 32,
        [0, 1] * 15 + [2, 1],
    ],
    ids=["mixed", "one empty", "two empty", "one row"],
)
def test_rows_get_the_answer_of_their_own_group_in_their_own_order(groups: list[int]) -> None:
    model, batch = routed(groups), random_batch(SCHEMA, 32)
    logits = model(batch)
    assert logits.shape == (32,)
    torch.testing.assert_close(logits, row_by_row(model, batch, groups))
    others = row_by_row(model, batch, [(g + 1) % 3 for g in groups])
    assert not torch.isclose(logits, others).any()


def test_a_model_that_nobody_needs_is_not_asked_on_one_rank() -> None:
    model, batch = routed([0, 2] * 4), random_batch(SCHEMA, 8)
    asked: list[tuple[int, int]] = []
    for k, own in enumerate(model.subnets):
        own.register_forward_pre_hook(lambda _, batches, k=k: asked.append((k, batches[0].size)))
    model(batch)
    assert asked == [(0, 4), (2, 4)]


def test_lists() -> None:
    schema = list_schema()
    widths = [{"one": 4, "mean": 8, "sum": 4, "scaled": 2}, {"one": 0, "mean": 4, "sum": 0, "scaled": 8}]
    groups = np.random.default_rng(1).integers(0, 2, 24).tolist()
    model, batch = routed(groups, widths, schema), random_lists(schema, 24)
    torch.testing.assert_close(model(batch), row_by_row(model, batch, groups))


def test_no_gradients_and_the_models_mode() -> None:
    model = routed([0, 1] * 4)
    assert not model(random_batch(SCHEMA, 8)).requires_grad
    assert all(m.training for m in model.train() and model.subnets)
    assert not any(m.training for m in model.eval() and model.subnets)


def test_places_of_rows_that_were_gathered_rank_by_rank() -> None:
    rows = list(range(17))
    batches = [rows[:8], rows[8:17]]
    shares = [[b[: len(b) // 3] for b in batches], [b[len(b) // 3 :] for b in batches]]
    places = stored_places([[len(part) for part in rank] for rank in shares])
    assert places.tolist() == [row for rank in shares for part in rank for row in part]
    assert stored_places([[]]).tolist() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


TINY = [{"left": 4, "big": 2, "right": 8, "idle": 0}, {"left": 8, "big": 0, "right": 4, "idle": 0}]


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    """A search's run directory as far as the figures need it: its schema, and groups of the test rows."""
    found = open_run(small_config(data, tmp_path / "run", method="ihas"), one_rank())
    found.schema.save(found.dir)
    return found


class LeftRouter(Given):
    """Group 1 for small ids of ``left``."""

    def __init__(self) -> None:
        pass

    def assign(self, batch: Batch) -> torch.Tensor:
        return (batch.sparse["left"].values() < 4).long()


def grouped_of(schema: Schema, widths: list[dict[str, int]]) -> GroupedAllocation:
    return GroupedAllocation(schema, tuple(Allocation(schema, w) for w in widths), tuple({} for _ in widths))


def evaluated(run: Run, model: RoutedModel, widths: list[dict[str, int]] = TINY, name: str = "ihas") -> dict[str, Any]:
    stream = run.stream("test", 150, shuffle=False)
    return evaluate_routed(model, run, grouped_of(run.schema, widths), stream, run.config, name, "centres")


def said_so(run: Run, groups: np.ndarray) -> None:
    """Leave the groups of the test rows as the search would."""
    (run.dir / "groups" / "assignment").mkdir(parents=True)
    np.save(run.dir / "groups" / "assignment" / "test.npy", groups)


def test_figures_of_the_whole_and_of_each_group(run: Run) -> None:
    model = RoutedModel(LeftRouter(), models_of(run.schema, TINY), run.schema, one_rank())
    whole = list(run.stream("test", 1000, shuffle=False).epoch(0))
    assert len(whole) == 1
    groups, labels, logits = LeftRouter().assign(whole[0]), whole[0].label, model(whole[0])
    said = groups.numpy().astype(np.uint8)
    said[:4] = 1 - said[:4]
    said_so(run, said)
    result = evaluated(run, model, name="ihas-seed3")
    json.dumps(result, allow_nan=False)
    rows = len(labels)
    assert (result["name"], result["split"], result["rows"]) == ("ihas", "test", rows)
    # Rows as good as equal may change places with the size of a batch: a pair is 2.5e-5, within a group 1e-4.
    assert result["auc"] == pytest.approx(auc(logits.numpy(), labels.numpy()), abs=1e-4)
    assert result["logloss"] == pytest.approx(float(binary_cross_entropy_with_logits(logits, labels)), rel=1e-5)
    tables = [sum(w[f.name] * f.cardinality for f in run.schema.fields) for w in TINY]
    physical = [sum((w[f.name] + 3) // 4 * 4 * f.cardinality for f in run.schema.fields) for w in TINY]
    assert result["embedding_parameters"] == sum(tables) + 7
    assert result["embedding_bytes"] == 4 * (sum(physical) + 7)
    assert result["dense_parameters"] == sum(m.dense_count() for m in model.subnets)
    flops = 1000.0
    for k, own in enumerate(result["groups"]):
        inside = groups == k
        share = float(inside.float().mean())
        flops += share * model.subnets[k].flops_per_sample()
        assert own["rows"] == int(inside.sum()) > 0
        assert own["auc"] == pytest.approx(auc(logits[inside].numpy(), labels[inside].numpy()), abs=5e-4)
        assert own["logloss"] == pytest.approx(
            float(binary_cross_entropy_with_logits(logits[inside], labels[inside])), rel=1e-5
        )
        assert (own["widths"], own["embedding_parameters"]) == (TINY[k], tables[k])
    assert result["flops_per_sample"] == pytest.approx(flops)
    router = result["router"]
    assert (router["kind"], router["embedding_parameters"]) == ("centres", 7)
    assert router["agreement"] == pytest.approx(1 - 4 / rows)
    assert 0 < router["share_of_time"] < 1


def test_figures_that_do_not_exist_are_none(run: Run) -> None:
    result = evaluated(run, RoutedModel(Given([0] * 1000), models_of(run.schema, TINY), run.schema, one_rank()))
    nobody = result["groups"][1]
    assert (nobody["rows"], nobody["auc"], nobody["logloss"]) == (0, None, None)
    assert result["router"]["agreement"] is None
    said_so(run, np.zeros(result["rows"], np.uint8))
    again = evaluated(run, RoutedModel(Given([0] * 1000), models_of(run.schema, TINY), run.schema, one_rank()))
    assert again["router"]["agreement"] == 1
    Schema("other", run.schema.fields, run.schema.dense, run.schema.rows).save(run.dir)
    other = evaluated(run, RoutedModel(Given([0] * 1000), models_of(run.schema, TINY), run.schema, one_rank()))
    assert other["router"]["agreement"] is None
    assert other["auc"] == result["auc"]


def test_groups_of_a_field_are_told_whatever_the_router_made_of_the_rows(run: Run) -> None:
    model = RoutedModel(LeftRouter(), models_of(run.schema, TINY), run.schema, one_rank())
    run.config.train.group = "idle"
    whole = next(iter(run.stream("test", 1000, shuffle=False).epoch(0)))
    found = measure(model, run.stream("test", 150, shuffle=False).epoch(0), one_rank(), "idle")
    ids = whole.sparse["idle"].values().numpy()
    assert found.ids is not None and np.array_equal(found.ids.numpy(), ids)
    areas = areas_by_group(found.logits.numpy(), whole.label.numpy(), ids)
    told = {"field": "idle", "auc": areas.mean, "groups": len(areas.rows), "rows": areas.share}
    assert evaluated(run, model)["by_group"] == told
    assert len(areas.rows) > 10


def test_rows_come_back_in_stored_order(run: Run) -> None:
    model = RoutedModel(LeftRouter(), models_of(run.schema, TINY), run.schema, one_rank())
    found = measure(model, run.stream("test", 150, shuffle=False).epoch(0), one_rank())
    whole = next(iter(run.stream("test", 1000, shuffle=False).epoch(0)))
    assert torch.equal(found.labels, whole.label)
    assert torch.equal(found.groups, LeftRouter().assign(whole))
    torch.testing.assert_close(found.logits, model(whole))
    assert 0 < found.routing < found.seconds


def test_a_router_of_fields_is_tables_all_over() -> None:
    tables = {"f0": torch.zeros(40, 2), "f2": torch.zeros(20, 2)}
    router = FieldRouter(SCHEMA, torch.zeros(2), tables)
    assert router.parameters() == router_tables(router) == 2 + 80 + 40
    assert router.flops_per_sample() == 4


def test_an_unknown_router_is_named(run: Run) -> None:
    with pytest.raises(UserError, match=r"'field' is none of centres, fields \(did you mean 'fields'\?\)"):
        open_router(run, "field", 2)


def test_files_of_evaluations() -> None:
    here = Path("x")
    names = [evaluation_file(here, s, r).name for s in ("test", "train") for r in ("", "fields")]
    assert names == [
        "evaluation.json",
        "evaluation-fields.json",
        "evaluation-train.json",
        "evaluation-train-fields.json",
    ]


def tables_of(widths: dict[str, int], seed: int, context: Context) -> ShardedTables:
    tables = [Table.of(f, widths[f.name]) for f in SCHEMA.fields if widths.get(f.name)]
    return ShardedTables(tables, context, DistConfig(), OptimConfig(), seed, 1.0)


def test_inherited_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embsearch_dist.methods.ihas.retraining.BLOCK_ROWS", 7)  # tables have 40, 30 and 20 rows
    base, into = tables_of(dict.fromkeys(SCHEMA.names, 8), 0, one_rank()), tables_of({"f2": 4, "f0": 8}, 1, one_rank())
    before, source = whole_tables(into), whole_tables(base)
    columns = {"f0": torch.tensor([0, 2, 3, 5, 7]), "f1": torch.tensor([], dtype=torch.int64), "f2": torch.tensor([6])}
    inherit(base, into, columns, one_rank())
    after = whole_tables(into)
    for name in ("f0", "f2"):
        width = len(columns[name])
        assert torch.equal(after[name][:, :width], source[name][:, columns[name]])
        assert torch.equal(after[name][:, width:], before[name][:, width:])
    assert all(torch.equal(whole_tables(base)[n], source[n]) for n in SCHEMA.names)


def test_kept_columns_must_fit_the_widths(data: Path, tmp_path: Path) -> None:
    run = open_run(small_config(data, tmp_path, "search.width=4", method="ihas"), one_rank())
    widths = [{"left": 2, "big": 0, "right": 4, "idle": 1}, {"left": 1, "big": 1, "right": 1, "idle": 1}]
    masks = [[[0, 1, 0, 1], [0] * 4, [1] * 4, [0, 0, 0, 1]], [[1, 0, 0, 0]] * 4]
    flat = [[bit for field in group for bit in field] for group in masks]
    write_json(tmp_path / "groups" / "kept.json", {"kept": flat})
    found = read_kept(run, grouped_of(run.schema, widths))
    assert [c.tolist() for c in found[0].values()] == [[1, 3], [], [0, 1, 2, 3], [3]]
    assert [c.tolist() for c in found[1].values()] == [[0]] * 4
    widths[1]["idle"] = 2
    with pytest.raises(UserError, match=r"kept.json: other columns than groups.json has widths"):
        read_kept(run, grouped_of(run.schema, widths))
    for broken in ({}, {"kept": flat[:1]}, {"kept": "no"}):
        write_json(tmp_path / "groups" / "kept.json", broken)
        with pytest.raises(UserError, match=r"kept.json: does not say which columns"):
            read_kept(run, grouped_of(run.schema, widths))
