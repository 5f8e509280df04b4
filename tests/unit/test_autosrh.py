"""DNIS: weights of frequency groups and scores of columns by hand, who learns when, and columns that noise fills."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.methods import METHODS
from embsearch_dist.methods.autosrh.method import GroupStage
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.run import Run
from tests.factories import one_rank, open_run, prepared, small_config, whole_tables

TRAINING = [
    "search.width=4",
    "search.groups=12",
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=5",
    "search.outer.lr=0.02",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_autosrh(data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *TRAINING, *words, method="autosrh"), one_rank())


def test_entries_are_weighed_by_the_group_of_their_value_and_columns_by_their_mean_size(
    data: Path, tmp_path: Path
) -> None:
    run = open_autosrh(data, tmp_path)
    task = GroupStage().task(run, training=False)
    with torch.no_grad():
        task.weights.copy_(torch.arange(48.0).view(12, 4) - 20)
    tables, groups = whole_tables(task.model.sharded), {}
    for name, first, rows in zip(
        run.schema.names, task.popularity.first.tolist(), run.schema.cardinalities, strict=True
    ):
        groups[name] = task.popularity.table[first : first + rows].long()
    weighed = [tables[name] * task.weights.detach()[groups[name]] for name in run.schema.names]
    expected = torch.stack([w.double().abs().mean(0) for w in weighed])
    torch.testing.assert_close(task.column_scores(), expected, rtol=1e-6, atol=0)
    batch = next(iter(run.stream("validation", 50, shuffle=False).epoch(0)))
    found = task.select_final(task.model.embed(batch), batch)
    for f, name in enumerate(run.schema.names):
        torch.testing.assert_close(found[:, f], weighed[f][batch.sparse[name].values().long()])


def test_held_out_rows_train_the_weights_and_a_penalty_is_on_their_size(data: Path, tmp_path: Path) -> None:
    gradients = []
    for l1 in (0.0, 0.5):
        words = ("search.outer.pretrain_epochs=0", f"search.l1={l1}")
        task = GroupStage().task(open_autosrh(data, tmp_path, *words), training=True)
        batch = next(iter(task.batches.epoch(0)))
        task.loss(batch, 3).backward()
        assert task.weights.grad is None and any(p.grad is not None for p in task.model.bare_head.parameters())
        task.model.zero_grad(set_to_none=True)
        task.outer_loss(2).backward()
        gradients.append(task.weights.grad.clone())
        task.close()
    assert gradients[0].abs().sum() > 0
    # The steps before were the same, so the penalty is all that differs: 0.5 * sign of weights, which are 1.
    torch.testing.assert_close(gradients[1], gradients[0] + 0.5)


def test_fields_that_matter_keep_more_columns_and_budgets_are_held(data: Path, tmp_path: Path) -> None:
    run, method = open_autosrh(data, tmp_path, "search.budget=170", "model.backbone=fm"), METHODS["autosrh"]()
    with pytest.raises(UserError, match="does not hold one column"):
        check_stages(method, run)
    run = open_autosrh(data, tmp_path, "search.budget=50%", "search.pareto=[3100]", "model.backbone=fm")
    check_stages(method, run)
    run_stages(method, run)
    some = Allocation.load(tmp_path / "allocations" / "autosrh-3100.json", run.schema)
    assert 0 < some.total("parameters") <= 3100
    assert min(some.widths["left"], some.widths["right"]) >= 2 > some.widths["big"]
    # Values that are met one to three times are those of an idle field; groups 8 and 9 are the values that matter.
    weight = GroupStage().finished(run).weights.detach().mean(1)
    assert max(weight[1:3]) < 0.5 < 1 < min(weight[8:10])


def test_values_met_as_often_share_a_weight_so_an_idle_field_keeps_what_its_twin_keeps(tmp_path: Path) -> None:
    """Where it must fail: an idle field of as many, equally frequent values as one that matters. Its rows of the tables
    are noise, and the weight of their group is that of the values that matter."""
    rng, rows = np.random.default_rng(0), 4000
    left, right, x = rng.integers(0, 12, rows), rng.integers(0, 12, rows), rng.standard_normal(rows)
    logit = 2 * (rng.standard_normal((12, 2)) @ rng.standard_normal((2, 12)))[left, right] + x
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    columns = {"click": click, "left": left, "right": right, "idle": rng.integers(0, 12, rows), "x": x}
    pl.DataFrame(columns).write_csv(tmp_path / "clicks.csv")
    fields = "left: categorical, right: categorical, idle: categorical, x: dense"
    (tmp_path / "clicks.yaml").write_text(f"files: clicks.csv\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", tmp_path / "clicks.yaml", tmp_path / "out", quiet=True)
    run = open_autosrh(tmp_path / "out", tmp_path / "run", "search.budget=50%", "search.pareto=[]", "model.backbone=fm")
    run_stages(METHODS["autosrh"](), run)
    task = GroupStage().finished(run)
    first = dict(zip(run.schema.names, task.popularity.first.tolist(), strict=True))
    groups = {n: set(task.popularity.table[first[n] + 1 : first[n] + 13].tolist()) for n in ("left", "idle")}
    assert groups["left"] == groups["idle"]
    assert Allocation.load(run.dir / "allocation.json", run.schema).widths["idle"] >= 1
