"""OptEmbed: prefixes drawn row by row, an evolution that writes to no parent, and fields that are known to be idle."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.kept_values import KeptValues
from embsearch_dist.methods.budget import check_feasible, parse_budget
from embsearch_dist.methods.optembed.config import EvolutionConfig
from embsearch_dist.methods.optembed.evolution import Evolution, Widths
from embsearch_dist.methods.optembed.method import OptEmbed, PrefixStage, closed, cost_of_kept, measured
from embsearch_dist.methods.optembed.rows import RowThreshold, slope
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.values import paying_values
from embsearch_dist.methods.widest import Sample
from embsearch_dist.run import Run
from embsearch_dist.train.metrics import evaluate
from tests.factories import one_rank, open_run, prepared, small_config, small_schema, table_gradients, whole_tables

ROWS = [10, 100, 1, 40]
SEARCH = [
    "search.width=4",
    "search.rows=400",
    "search.training.batch_size=128",
    "search.training.eval_batch_size=400",
    "search.training.epochs=6",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


def open_optembed(data: Path, directory: Path, *words: str) -> Run:
    return open_run(small_config(data, directory, *SEARCH, *words, method="optembed"), one_rank())


def cost(widths: Sequence[int]) -> float:
    return float(sum(n * w for n, w in zip(ROWS, widths, strict=True)))


def evolution(limit: float, seed: int = 0, least: int = 0) -> Evolution:
    """The best score is that of the widths 1, 2, 3, 4."""

    def score(widths: Widths) -> float:
        assert cost(widths) <= limit and any(widths)
        return -float(sum(abs(w - k - 1) for k, w in enumerate(widths)))

    return Evolution(EvolutionConfig(), 4, least, 8, cost, limit, score, [seed])


def test_evolution_finds_the_best_widths_and_the_best_that_a_budget_holds() -> None:
    free = evolution(1e9)
    assert free.run() == (1, 2, 3, 4)
    assert len(free.scored) <= 20 + 30 * 20
    # The best costs 373. Two columns less fit: (1, 0, 3, 4) at 173 and (1, 1, 3, 3) at 233, the cheaper one first.
    assert evolution(233).run() == (1, 0, 3, 4)
    assert evolution(1e9, seed=1).run() == evolution(1e9, seed=1).run()


def test_no_parent_is_written_to() -> None:
    """The published code edits the parents and with them the best candidate that it has recorded."""
    one = evolution(1e9)
    parent, other = (1, 2, 3, 4), (8, 7, 6, 5)
    for _ in range(200):
        child = one.mutated(parent)
        assert parent == (1, 2, 3, 4) and all(0 <= w <= 8 for w in child)
        cut = one.crossed(parent, other)
        assert tuple(cut) in {(1, 7, 6, 5), (1, 2, 6, 5), (1, 2, 3, 5)}
    before = dict(one.scored)
    one.run()
    assert all(one.scored[w] == one.score(w) for w in one.scored) and before == {}


def test_repair_cuts_what_is_too_dear_and_keeps_a_field() -> None:
    search = evolution(60)
    for _ in range(100):
        fixed = search.repaired([8, 8, 8, 8])
        assert cost(fixed) <= 60 and all(w <= 8 for w in fixed)
    assert search.repaired([1, 0, 2, 1]) == (1, 0, 2, 1)  # it fits
    assert search.repaired([0, 0, 0, 0]) == (0, 0, 1, 0)  # the cheapest
    with pytest.raises(ValueError, match="the least widths"):
        evolution(100, least=1).repaired([1, 1, 1, 1])


def test_a_column_that_no_budget_holds_is_no_result() -> None:
    """Where all fields can be dropped, the one that is kept all the same must fit, too."""
    with pytest.raises(ValueError, match="one column of the cheapest field costs more than 0.5"):
        evolution(0.5).repaired([0, 0, 0, 0])


def losing(cardinality: int, dropped: int) -> KeptValues:
    mask = torch.ones(cardinality, dtype=torch.bool)
    mask[1 : 1 + dropped] = False
    return KeptValues.of(mask.numpy())


@pytest.mark.parametrize("text", ["ues-1", "800000B", "60%"])
@pytest.mark.parametrize("least", [0, 1])
def test_values_are_dropped_only_where_their_rows_are_more_than_the_bits(text: str, least: int) -> None:
    """At int8 a row takes 16 bytes or more: field 0 saves one row and field 1 many, a bit a value being 12,500 and
    6,250 bytes."""
    schema = small_schema(100_000, 50_000)
    budget = parse_budget(text, schema, precision="int8")
    if text == "800000B" and least:
        return  # refused beforehand
    check_feasible(budget, schema, range(least, 33))
    values = {"f0": losing(100_000, 1), "f1": losing(50_000, 300 if text == "ues-1" else 1)}
    cost = cost_of_kept(schema, values, budget.resource, 0)
    search = Evolution(EvolutionConfig(generations=3), 2, least, 32, cost, budget.limit, lambda w: sum(w), [0])
    best = search.run()
    for widths in search.scored:
        kept = paying_values(schema, widths, values, budget.resource, 0)
        found = Allocation(schema, dict(zip(schema.names, widths, strict=True)), values=kept)
        assert found.total(budget.resource) == cost(widths) <= budget.limit
        assert "f0" not in kept or not widths[0]
    assert best in search.scored
    assert set(paying_values(schema, [0, 4], values, "parameters", 0)) == {"f0", "f1"}  # no bits are counted
    assert set(paying_values(schema, [4, 4], {"f0": losing(100_000, 800)}, "served_int8", 0)) == {"f0"}
    assert not paying_values(schema, [4, 4], {"f0": losing(100_000, 700)}, "served_int8", 0)


def test_each_row_and_field_draws_a_width_and_only_its_columns_learn(data: Path, tmp_path: Path) -> None:
    run = open_optembed(data, tmp_path, "optim.embedding=sgd", "optim.embedding_lr=1e4", "model.init_std=0.1")
    task = PrefixStage().task(run)
    drawn = torch.stack([task.drawn(500, step) for step in range(8)])
    shares = torch.stack([(drawn == w).float().mean((0, 1)) for w in range(6)])
    torch.testing.assert_close(shares[1:5], torch.full((4, 4), 0.25), atol=0.03, rtol=0)
    assert shares[0].sum() == shares[5].sum() == 0
    assert torch.equal(task.drawn(500, 3), drawn[3]) and not torch.equal(drawn[2], drawn[3])
    batch = next(iter(run.stream("train", 128, shuffle=True).epoch(0)))
    before, widths = whole_tables(task.model.sharded), task.drawn(128, 0)
    task.loss(batch, 0).backward()
    task.model.sharded.step()
    gradient = table_gradients(task.model.sharded, before)
    ids = batch.sparse["big"].values().long()
    once = [r for r in range(128) if (ids == ids[r]).sum() == 1]
    assert len(once) > 50
    for r in once:  # a value that a single row has moves in the columns that the row drew
        assert (gradient["big"][ids[r]] != 0).sum() <= widths[r, run.schema.names.index("big")]
    assert any((gradient["big"][ids[r]] != 0).any() for r in once)


@pytest.mark.parametrize("thresholds", [False, True])
def test_a_score_is_that_of_the_model_with_closed_columns(thresholds: bool, data: Path, tmp_path: Path) -> None:
    """Where rows have thresholds, these count all columns, closed or not."""
    run = open_optembed(data, tmp_path, "model.init_std=0.5", f"search.thresholds={thresholds}")
    task = PrefixStage().task(run)
    task.model.eval()
    if thresholds:
        with torch.no_grad():
            task.mask.rows.t.fill_(1.5)
    batches = list(run.stream("validation", 200, shuffle=False).epoch(0))
    widths = (1, 0, 4, 2)
    found = measured(task.model, Sample.of(task.model, iter(batches), torch.device("cpu")), widths, run.context)
    task.mask.widths = torch.tensor(widths)
    whole = evaluate(task.predict, iter(batches), run.context)
    assert found == pytest.approx({key: whole[key] for key in found}, rel=1e-5) and {"auc", "logloss"} <= found.keys()
    torch.testing.assert_close(closed(torch.ones(2, 3), torch.tensor([1, 3])), torch.tensor([[1.0, 0, 0], [1, 1, 1]]))


def test_fields_that_do_not_matter_are_dropped_or_narrow(data: Path, tmp_path: Path) -> None:
    run = open_optembed(data, tmp_path, "search.drop=true", "search.pareto=[60]")
    check_stages(OptEmbed(), run)
    run_stages(OptEmbed(), run)
    found = Allocation.load(tmp_path / "allocation.json", run.schema)
    assert found.widths["big"] == found.widths["idle"] == 0
    assert min(found.widths["left"], found.widths["right"]) >= 2
    some = Allocation.load(tmp_path / "allocations" / "optembed-60.json", run.schema)
    assert 0 < some.total("parameters") <= 60


def test_a_row_threshold_by_hand() -> None:
    x = torch.tensor([[[0.5, -1.0], [0.2, -0.25]]], requires_grad=True)
    rows = RowThreshold(2)
    with torch.no_grad():
        rows.t.copy_(torch.tensor([1.2, 0.55]))
    out = rows(x)
    torch.testing.assert_close(out, torch.tensor([[[0.5, -1.0], [0.0, 0.0]]]))
    out.sum().backward()
    # 1.5 - 1.2 = 0.3 has the slope 0.8, 0.45 - 0.55 = -0.1 the slope 1.6; the step multiplies the sums -0.5 and -0.05.
    torch.testing.assert_close(rows.t.grad, torch.tensor([0.5 * 0.8, 0.05 * 1.6]))
    torch.testing.assert_close(x.grad, torch.tensor([[[1 - 0.4, 1 + 0.4], [-0.08, 0.08]]]))
    torch.testing.assert_close(slope(torch.tensor([-0.4, 0.7, 1.5, 0.0])), torch.tensor([0.4, 0.4, 0.0, 2.0]))
    assert float(rows.push()) == pytest.approx(math.exp(-1.2) + math.exp(-0.55))


def test_rows_of_rare_values_and_of_an_idle_field_are_dropped_and_widths_are_paid_for_the_rest(
    data: Path, tmp_path: Path
) -> None:
    words = ["search.thresholds=true", "search.threshold_lr=0.01", "search.alpha=0.01", "search.drop=true"]
    words += ["search.budget=60"]  # less than left and right take at width 4 with all their rows, more than with these
    run = open_optembed(data, tmp_path, *words, "optim.embedding_l2=1e-3", "optim.embedding_lr=0.01")
    run_stages(OptEmbed(), run)
    found = Allocation.load(tmp_path / "allocation.json", run.schema)
    share = {f.name: found.rows(f.name) / f.cardinality for f in run.schema.fields}
    assert min(share["left"], share["right"]) > 0.6 and share["idle"] < 0.4 and share["big"] < 0.02, share
    assert (
        found.total("parameters")
        <= 60
        < 4 * sum(f.cardinality for f in run.schema.fields if f.name in ("left", "right"))
    )
    assert found.total("parameters") == sum(found.rows(n) * w for n, w in found.widths.items())
    assert min(found.widths["left"], found.widths["right"]) >= 2
    task = PrefixStage().trained(run)
    tables = whole_tables(task.model.sharded)
    for f, name in enumerate(run.schema.names):
        above = tables[name].abs().sum(1) > task.mask.rows.t[f]
        assert found.values[name].mask[1:].tolist() == above[1:].tolist()
    mask = json.loads((tmp_path / "search" / "mask-optembed.json").read_text())
    assert mask["parameters"] == found.total("parameters") < mask["structured"]["parameters"]
