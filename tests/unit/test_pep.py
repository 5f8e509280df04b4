"""PEP: thresholds and what they keep by hand, masks that hold their budgets, and an idle field of many values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.methods.budget import Budget
from embsearch_dist.methods.pep.margins import Margins, edge_of
from embsearch_dist.methods.pep.method import PEP, entries_under, mask_told, measure
from embsearch_dist.methods.pep.thresholds import SoftThreshold, ThresholdStage
from embsearch_dist.methods.pep.tickets import TicketTask, masks_of
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.models.model import SubnetModel
from tests.factories import one_rank, open_run, prepared, small_config, small_schema, whole_tables

LOG3 = math.log(3)  # sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def test_a_threshold_by_hand() -> None:
    mask = SoftThreshold(2, 2, "field", -LOG3)
    v = torch.tensor([[[0.5, -1.0], [0.2, -0.25]]], requires_grad=True)
    out = mask(v)
    torch.testing.assert_close(out, torch.tensor([[[0.25, -0.75], [0.0, 0.0]]]))
    out.sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    # d/ds of sign(v) * (|v| - sigmoid(s)) is -sign(v) * 3/16: the entries 0.5 and -1 cancel, those below have none.
    torch.testing.assert_close(mask.s.grad, torch.zeros(2, 1))
    shapes = {"field_dim": (2, 3), "field": (2, 1), "dim": (1, 3), "global": (1, 1)}
    for granularity, shape in shapes.items():
        assert SoftThreshold(2, 3, granularity, 0.0).s.shape == shape
        assert SoftThreshold(2, 3, granularity, 0.5).per_entry().tolist() == [[0.5] * 3] * 2


def test_what_a_shift_of_all_thresholds_keeps() -> None:
    """Entries of margin logit(|v|) - s: 0 where |v| is the threshold itself, 2 log 3 from 1/4 to 3/4."""
    schema = small_schema(3, 2)
    v = torch.tensor([[[0.75, 0.25], [-0.75, 0.3], [0.1, 0.0]], [[0.5, 0.5], [0.9, 9.0], [0.9, 9.0]]])
    inside = torch.tensor([[1, 1, 1], [1, 1, 0]])  # the second table has two rows
    margins = Margins(schema, 2)
    margins.add(v, torch.full((2, 2), -LOG3), inside)
    assert margins.kept(edge_of(-0.02)).tolist() == [[2, 2], [2, 2]]  # 1/4 is just in
    assert margins.kept(edge_of(0.01)).tolist() == [[2, 1], [2, 2]]
    assert margins.kept(edge_of(1.2)).tolist() == [[2, 0], [1, 1]]  # logit(1/2) - s = log 3 = 1.1
    for most in range(1, 10):
        edge = margins.edge_under(most)
        assert 1 <= int(margins.kept(edge).sum()) <= most
        assert edge == 0 or int(margins.kept(edge - 1).sum()) > most  # the least shift that fits
    told = mask_told(schema, margins.kept(edge_of(1.2)))
    assert told["entries"] == 4 and told["of"] == 10
    assert told["served_bytes"] == {"fp32": 5 + 16, "fp16": 5 + 8}  # a byte of bits for each of five rows


def test_how_many_entries_a_budget_holds() -> None:
    schema = small_schema(60, 40)
    assert entries_under(Budget("parameters", 500, ""), schema, 16, 0) == 500
    assert entries_under(Budget("parameters", 500, ""), schema, 16, 1) == 400  # a column beside them in each table
    assert entries_under(Budget("bytes", 1000, ""), schema, 16, 0) == (1000 - 100 * 2) / 4
    assert entries_under(Budget("served_fp16", 1000, ""), schema, 9, 0) == (1000 - 100 * 2) / 2
    assert entries_under(Budget("served_int4", 150, ""), schema, 9, 0) < 1  # the bits take more
    assert entries_under(Budget("parameters", 90, ""), schema, 16, 1) < 1  # so does what no mask closes


def test_widths_are_no_chance_where_a_budget_does_not_hold_the_bits_of_a_mask(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a mask of one entry all columns but one are as empty as each other: the first fields got them."""
    words = ["search.width=4", "search.training.batch_size=128", "search.training.eval_batch_size=400"]
    words += ["search.training.epochs=3", "search.budget=9000", "search.tickets=true", "optim.embedding_l2=1e-3"]
    monkeypatch.setattr("embsearch_dist.methods.pep.method.entries_under", lambda *_: -1.0)
    run = open_run(small_config(data, tmp_path, *words, method="pep"), one_rank())
    run_stages(PEP(), run)
    found = Allocation.load(tmp_path / "allocation.json", run.schema)
    assert found.total("parameters") <= 9000 and found.widths["left"] == found.widths["right"] == 4
    mask = json.loads((tmp_path / "search" / "mask-pep.json").read_text())
    assert mask["mask_over_budget"] and found.provenance["mask_over_budget"] and mask["entries"] > 8000
    assert not (tmp_path / "search" / "ticket-pep.json").exists()
    assert "takes more than 9000 by itself" in capsys.readouterr().out


def test_thresholds_are_learned_at_a_rate_of_their_own_and_all_rows_of_all_tables_are_counted(
    data: Path, tmp_path: Path
) -> None:
    words = ["search.width=4", "search.training.batch_size=256", "search.training.eval_batch_size=400"]
    words += ["search.training.epochs=1", "search.lr=0.05", "optim.weight_decay=0.1", "search.start=-3"]
    run = open_run(small_config(data, tmp_path, *words, method="pep"), one_rank())
    task = ThresholdStage().task(run)
    rest, own = task.model.make_optimizer(run.config.optim).param_groups
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (0.05, 0.0, 1)
    assert len(rest["params"]) + 1 == len(list(task.model.bare_head.parameters()))
    assert (rest["lr"], rest["weight_decay"]) == (0.01, 0.1)

    ThresholdStage().run(run)
    margins, trained = measure(run), ThresholdStage().trained(run)
    s, tables = trained.mask.per_entry(), whole_tables(trained.model.sharded)
    assert (s - -3).abs().max() > 0.05
    kept = margins.kept(edge_of(0.0))
    for f, name in enumerate(run.schema.names):
        assert margins.counts[f].sum() == 4 * run.schema.cardinalities[f]
        exact = (trained.mask(tables[name][:, None].expand(-1, 4, -1))[:, f] != 0).sum(0)
        assert (kept[f] - exact).abs().max() <= 0.01 * run.schema.cardinalities[f]  # a bin of 0.01


def test_masks_and_widths_hold_their_budgets_and_an_idle_field_gets_the_least(data: Path, tmp_path: Path) -> None:
    words = ["search.width=4", "search.training.batch_size=128", "search.training.eval_batch_size=400"]
    words += ["search.training.epochs=3", "search.budget=4000", "search.pareto=[9000]", "optim.embedding_l2=1e-3"]
    run = open_run(small_config(data, tmp_path, *words, method="pep"), one_rank())
    check_stages(PEP(), run)
    run_stages(PEP(), run)
    for name, most in (("pep", 4000), ("pep-9000", 9000)):
        mask = json.loads((tmp_path / "search" / f"mask-{name}.json").read_text())
        assert 0.9 * most < mask["entries"] <= most
        assert mask["entries"] == sum(map(sum, mask["by_column"].values()))
        found = Allocation.load(tmp_path / "allocations" / f"{name}.json", run.schema)
        assert found.total("parameters") <= most and found.provenance["mask_share"] == mask["mask_share"]
        share = {f.name: sum(mask["by_column"][f.name]) / f.cardinality / 4 for f in run.schema.fields}
        assert min(share["left"], share["right"]) > max(share["big"], share["idle"])
    assert found.widths["left"] == found.widths["right"] == 4


def test_a_ticket_begins_with_the_initial_tables_and_keeps_its_zeros(data: Path, tmp_path: Path) -> None:
    words = ["search.width=4", "search.training.batch_size=128", "search.training.eval_batch_size=400"]
    words += ["search.training.epochs=1", "search.budget=9000", "search.tickets=true", "model.first_order=value"]
    run = open_run(small_config(data, tmp_path, *words, method="pep"), one_rank())
    check_stages(PEP(), run)
    run_stages(PEP(), run)
    told = json.loads((tmp_path / "search" / "mask-pep.json").read_text())
    figures = json.loads((tmp_path / "search" / "ticket-pep.json").read_text())
    assert figures["entries"] == told["entries"] and figures["steps"] == 24
    assert 0.6 < figures["test"]["auc"] < 1 and 0.6 < figures["validation"]["auc"] < 1

    trained = ThresholdStage().trained(run)
    s = dict(zip(run.schema.names, trained.mask.per_entry(), strict=True))
    masks = masks_of(trained.model.sharded, s, 4, told["shift"])
    closed = {name: ~mask for (name, _, _), mask in masks.items()}
    assert sum(int(4 * len(c) - c[:, :4].sum()) for c in closed.values()) == told["entries"]
    assert not any(c[:, 4:].any() for c in closed.values())  # a value's own weight is no entry
    fresh = whole_tables(SubnetModel(run.config, Allocation.uniform(run.schema, 4), run.context).sharded)
    task = TicketTask(run, masks, {})
    before = whole_tables(task.model.sharded)
    assert all(torch.equal(before[n], fresh[n] * ~closed[n]) for n in fresh)
    batch = next(iter(run.stream("train", 64, shuffle=True).epoch(0)))
    task.loss(batch, 0).backward()
    task.model.sharded.step()
    assert any(whole_tables(task.model.sharded)[n][closed[n]].any() for n in fresh), "the step itself moves them"
    task.after_step(1, None)
    after = whole_tables(task.model.sharded)
    assert not any(after[n][closed[n]].any() for n in fresh)
    assert any(not torch.equal(after[n], before[n]) for n in fresh)
