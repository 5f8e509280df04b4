"""OptFS: gates, temperature and penalty by hand, budgets of rows, rare junk that it drops, widths it cannot find."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.data.planted.synthetic import Pair, Plan, make_synthetic
from embsearch_dist.data.prepare.pipeline import prepare
from embsearch_dist.errors import UserError
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.optfs.gates import EVERY, START, gate, pull, tau_of
from embsearch_dist.methods.optfs.method import (
    OptFS,
    Ranking,
    ValueGateStage,
    check_one_value,
    chosen_under,
    cost_of_rows,
    costs_of,
)
from embsearch_dist.methods.optfs.rewinding import rewind
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.values import mask_told
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import evaluate
from embsearch_dist.train.monitor import Monitor
from embsearch_dist.train.retrain import SubnetTask, retrain
from tests.factories import one_rank, open_run, prepared, small_config, small_schema, streams, whole_tables
from tests.method_contract import Case
from tests.raw_lists import make_lists

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="module")
def junk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``item`` has 20 values that make the clicks and 1200 that come twice or so and say nothing."""
    folder, rows = tmp_path_factory.mktemp("junk"), 6000
    rng = np.random.default_rng(0)
    effect = rng.choice([-1.6, 1.6], 20)
    known = rng.random(rows) < 0.6
    item = np.where(known, rng.integers(0, 20, rows), rng.integers(20, 1220, rows))
    logit = np.where(known, effect[np.minimum(item, 19)], 0.0)
    click = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    frame = {"click": click, "item": [f"v{k}" for k in item], "noise": rng.integers(0, 30, rows), "x": rng.random(rows)}
    pl.DataFrame(frame).write_csv(folder / "clicks.csv")
    fields = "item: categorical, noise: categorical, x: dense"
    (folder / "clicks.yaml").write_text(f"name: junk\nfiles: clicks.csv\nlabel: click\nfields: {{{fields}}}\n")
    prepare("table", folder / "clicks.yaml", folder / "out", quiet=True)
    return folder / "out"


def searched(data: Path, directory: Path, *words: str) -> Run:
    run = open_run(small_config(data, directory, *words, method="optfs"), one_rank())
    check_stages(OptFS(), run)
    run_stages(OptFS(), run)
    return run


def test_gate_temperature_and_pull_by_hand() -> None:
    assert float(gate(torch.tensor(START), 1.0)) == 1.0
    w = torch.tensor([LOG3 / 2, -LOG3 / 2])
    torch.testing.assert_close(gate(w, 2.0), torch.tensor([0.75, 0.25]) * (1 + math.exp(-0.5)))
    # d sigmoid(2 w)/dw = 2 * 3/4 * 1/4 on both sides.
    torch.testing.assert_close(pull(w, 2.0), torch.tensor([0.375, 0.375]))
    grown = w.clone().requires_grad_()
    torch.sigmoid(2 * grown).sum().backward()
    torch.testing.assert_close(pull(w, 2.0), grown.grad)
    assert [tau_of(e, 4, 1000.0) for e in range(5)] == pytest.approx([1, 10, 100, 1000, 1000])
    assert tau_of(0, 1, 200.0) == 1


def test_embeddings_and_own_weights_are_gated_by_the_value_and_l2_sees_them_plain(data: Path, tmp_path: Path) -> None:
    words = ["search.width=3", "search.lr=0.02", "model.first_order=value"]
    run = open_run(small_config(data, tmp_path, *words, method="optfs"), one_rank())
    task = ValueGateStage().task(run)
    model = task.model
    assert model.scale == pytest.approx(0.02 / 0.05)
    with torch.no_grad():
        for _, column in model.parts():
            assert not column.any(), "gates begin at START"
            column.copy_(torch.linspace(-2, 1, len(column)))
    batch = next(iter(run.stream("train", 64, shuffle=True).epoch(0)))
    model.tau = 3.0
    pooled = model.tables(batch.sparse)
    gated = model.gated(pooled, batch)
    tables = whole_tables(model.sharded)
    for f, name in enumerate(run.schema.names):
        row = tables[name][batch.sparse[name].values().long()]  # 3 columns, the gate's, the own weight
        opened = gate(START + model.scale * row[:, 3], 3.0)
        torch.testing.assert_close(gated.stack()[f], row[:, :3] * opened[:, None])
        torch.testing.assert_close(gated.first_order()[:, f], row[:, 4] * opened)
    _, plain = model(batch)
    squares = sum(float(part.square().sum()) for part in plain.used())
    wanted = [tables[n][batch.sparse[n].values().long()][:, [0, 1, 2, 4]] for n in run.schema.names]
    assert squares == pytest.approx(sum(float(x.square().sum()) for x in wanted), rel=1e-5)


def test_the_gate_of_a_list_is_that_of_the_mean_of_its_ids(tmp_path: Path) -> None:
    source, _ = make_lists(tmp_path / "raw", rows=600)
    prepare("table", source, tmp_path / "out", min_count=2, quiet=True)
    run = open_run(small_config(tmp_path / "out", tmp_path / "run", "search.width=4", method="optfs"), one_rank())
    model = ValueGateStage().task(run).model
    with torch.no_grad():
        for _, column in model.parts():
            column.fill_(-1.25)
    batch = next(iter(run.stream("train", 64, shuffle=True).epoch(0)))
    pooled = model.tables(batch.sparse)
    lengths = torch.stack([batch.sparse[n].lengths() for n in run.schema.names])
    assert bool((lengths > 1).any()) and bool((lengths == 0).any())
    opened = gate(torch.tensor(START - 1.25 * model.scale), 1.0)
    weighted = [f.weighted for f in run.schema.fields]
    got, plain = model.gated(pooled, batch).stack(), pooled.stack()[..., :4]
    for f in (f for f in range(len(weighted)) if not weighted[f]):
        torch.testing.assert_close(got[f], plain[f] * opened)


def test_the_penalty_pulls_every_gate_in_every_step_and_resumes_where_it_was(data: Path, tmp_path: Path) -> None:
    words = ["search.width=4", "search.penalty=0.5", "search.lr=0.1", "search.tau=16", "search.training.epochs=3"]
    run = open_run(small_config(data, tmp_path, *words, method="optfs"), one_rank())
    task = ValueGateStage().task(run)
    task.load_state({"epoch": 1})
    assert task.model.tau == 4.0
    with Monitor(tmp_path, "gates", 0, quiet=True) as monitor:
        monitor.resume_at(0)
        for step in range(1, 2 * EVERY):
            task.after_step(step, monitor)
    wanted = START - EVERY * 0.1 * 0.5 * float(pull(torch.tensor(START), 4.0))
    for w in task.model.weights_of_all().values():
        torch.testing.assert_close(w, torch.full_like(w, wanted))
    assert task.state() == {"epoch": 1}


def test_budgets_count_rows_the_shared_ones_and_bits() -> None:
    schema = small_schema(5, 3, 9)
    w = [torch.tensor([9.0, 0.4, -0.1, 0.3, 0.2]), torch.tensor([9.0, -1.0, -2.0]), torch.linspace(-0.8, 0.05, 9)]
    ranking = Ranking(w)  # id 0 takes no part, whatever its gate
    assert ranking.learned == 4 and len(ranking.order) == 14
    assert ranking.counts(0) == [0, 0, 0] and ranking.counts(3) == [4, 0, 0] and ranking.counts(4) == [4, 0, 2]
    assert [m.nonzero().flatten().tolist() for m in ranking.masks(4)] == [[1, 3, 4], [], [8]]
    assert cost_of_rows(schema, [4, 0, 2], 8, "parameters", 1) == 6 * 9
    assert cost_of_rows(schema, [4, 0, 2], 4, "served_fp32", 0) == 6 * 16 + 1 + 2
    assert cost_of_rows(schema, [5, 3, 0], 4, "served_fp32", 0) == 8 * 16  # whole tables need no bits
    assert chosen_under(schema, ranking, 4, None, 0) == 4
    for limit in range(8, 17 * 4 + 9):
        kept = chosen_under(schema, ranking, 4, Budget("parameters", limit, ""), 0)
        assert cost_of_rows(schema, ranking.counts(kept), 4, "parameters", 0) <= limit
        more = cost_of_rows(schema, ranking.counts(kept + 1), 4, "parameters", 0)
        assert kept == ranking.learned or more > limit  # shut ones stay out, whatever a budget holds
    check_one_value([("a", Budget("served_fp32", 2 * 16 + 2, "x"))], schema, 4, 0)
    with pytest.raises(UserError, match=r"does not hold a single value of field 'f2' \(9 values\)"):
        check_one_value([("a", None), ("b", Budget("served_fp32", 2 * 16 + 1, "x"))], schema, 4, 0)
    told = mask_told(schema, [4, 0, 4], {}, 0)
    assert told["rows"] == {"f0": [5, 5], "f1": [0, 3], "f2": [9, 9]}


@pytest.mark.parametrize("resource", ["parameters", "bytes", "served_int8", "served_fp32", "served_mixed"])
def test_a_budget_holds_as_many_values_as_it_can(resource: str) -> None:
    """The last value of a field of 4,000 makes 500 bytes of bits needless: with all of them a budget may hold what it
    does not hold with some."""
    schema = small_schema(4000, 2, 1, 50)
    generator = torch.Generator().manual_seed(3)
    ranking = Ranking([torch.rand(n, generator=generator) + 0.1 for n in schema.cardinalities])
    most = ranking.learned
    every = [cost_of_rows(schema, ranking.counts(kept), 4, resource, 1) for kept in range(most + 1)]
    assert costs_of(schema, ranking, most, 4, resource, 1).tolist() == every
    for limit in (every[-1], every[-1] - 1, every[most // 2], every[most - 5], every[3]):
        kept = chosen_under(schema, ranking, 4, Budget(resource, limit, ""), 1)
        assert kept == max(k for k, cost in enumerate(every) if cost <= limit)
    assert chosen_under(schema, ranking, 4, Budget(resource, every[-1], ""), 1) == most


def test_rare_junk_is_dropped_and_what_makes_the_clicks_is_kept(junk: Path, tmp_path: Path) -> None:
    words = ["search.width=4", "search.training.batch_size=128", "search.training.eval_batch_size=600"]
    words += [
        "search.training.epochs=6",
        "search.lr=0.03",
        "search.penalty=0.5",
        "search.pareto=[124]",
        "optim.embedding_lr=0.01",
    ]
    run = searched(junk, tmp_path, *words)
    found = Allocation.load(tmp_path / "allocation.json", run.schema)
    values = pl.read_parquet(junk / "vocabulary" / "item.parquet")
    of_value = dict(zip(values["value"].to_list(), values["id"].to_list(), strict=True))
    useful = [of_value[f"v{k}"] for k in range(20)]
    kept = found.values["item"].mask
    rest = kept.sum() - 1 - kept[useful].sum()
    assert kept[useful].sum() >= 18 and rest < 0.2 * (len(kept) - 21), (kept[useful].sum(), rest, len(kept))
    mask = json.loads((tmp_path / "search" / "mask-optfs.json").read_text())
    assert mask["rows"]["item"] == [int(kept.sum()), len(kept)]
    assert mask["served_bytes"]["int8"] == found.total("served_int8") < mask["structured"]["served_bytes"]["int8"] / 3
    tight = Allocation.load(tmp_path / "allocations" / "optfs-124.json", run.schema)
    assert 100 < tight.total("parameters") <= 124 and tight.values["item"].mask[useful].sum() >= 15


def test_it_cannot_find_that_narrow_tables_would_do(tmp_path: Path) -> None:
    """All values come equally often and count, in one direction: at width 8 a budget holds a quarter of them, at width
    2 all. OptFS has to drop what it needs."""
    plan = Plan(pairs=(Pair(1, (24, 24), 3.0),), idle=(4,), main_effects=(), main_variance=0.0, zipf=0.0, intercept=0.0)
    make_synthetic(tmp_path / "data", 8000, plan=plan, quiet=True)
    words = ["search.width=8", "search.training.batch_size=256", "search.training.epochs=4", "search.budget=ues-2"]
    words += ["train.epochs=3", "train.batch_size=256", "optim.embedding_lr=0.02"]
    run = searched(tmp_path / "data", tmp_path / "run", *words)
    found = Allocation.load(tmp_path / "run" / "allocation.json", run.schema)
    narrow = Allocation.uniform(run.schema, 2)
    assert found.total("parameters") <= narrow.total("parameters")
    assert {w for w in found.widths.values() if w} == {8}
    auc = {}
    for name, allocation in (("optfs", found), ("ues-2", narrow)):
        task = retrain(run.config, allocation, *streams(run), run.context, tmp_path / name, quiet=True)
        task.model.eval()
        auc[name] = evaluate(task.predict, streams(run)[1].epoch(0), run.context)["auc"]
    assert auc["optfs"] < auc["ues-2"] - 0.05, auc


def test_rewinding_begins_with_the_kept_rows_of_the_weights_after_an_epoch(data: Path, tmp_path: Path) -> None:
    words = ["search.width=4", "search.training.batch_size=256", "search.training.eval_batch_size=400"]
    words += ["search.training.epochs=3", "search.rewind=1", "search.budget=1500", "model.first_order=value"]
    run = searched(data, tmp_path, *words)
    one = dataclasses.replace(run.config.search.training, steps=run.schema.rows["train"] // 256)
    first = open_run(small_config(data, tmp_path / "first", *words, method="optfs"), one_rank())
    first.config.search.training = one  # its last checkpoint is that after an epoch
    ValueGateStage().run(first)
    after = ValueGateStage().trained(first)
    tables, head = whole_tables(after.model.sharded), after.model.bare_head.state_dict()

    found = Allocation.load(tmp_path / "allocation.json", run.schema).counted(1)
    assert {"big", "left"} <= set(found.values)
    found = dataclasses.replace(found, widths=found.widths | {"idle": 0})  # the head loses inputs with a field
    task = SubnetTask(run.config, found, run.context)
    rewind(run, tmp_path, found, task)
    for name, table in whole_tables(task.model.sharded).items():
        rows = found.values[name].ids if name in found.values else slice(None)
        torch.testing.assert_close(table[:, :4], tables[name][rows][:, :4], rtol=0, atol=0)
        torch.testing.assert_close(table[:, 4], tables[name][rows][:, 5], rtol=0, atol=0)
    kept = [run.schema.names.index(n) for n in found.kept]
    inputs = [4 * f + k for f in kept for k in range(4)] + [4 * len(run.schema.names)]
    new = task.model.bare_head.state_dict()
    torch.testing.assert_close(new["backbone.first.weight"], head["backbone.first.weight"][:, inputs])

    figures = Case("optfs", str(data), tuple(words)).retrain(tmp_path, one_rank())["optfs"]
    assert 0.5 < figures["auc"] < 1
    assert figures["table_rows"] == {n: kept.rows for n, kept in found.values.items()}
    shutil.rmtree(tmp_path / "checkpoints" / "rewound")
    with pytest.raises(UserError, match=r"search.rewind"):
        Case("optfs", str(data), tuple(words)).retrain(tmp_path, one_rank(), name="again")


def test_there_must_be_an_epoch_after_the_one_that_is_rewound_to(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.rewind: must be at most 1"):
        small_config(data, tmp_path, "search.rewind=2", "search.training.epochs=2", method="optfs")
