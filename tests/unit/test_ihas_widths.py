"""Groups with widths under one budget: one knapsack over all tables, losses by the groups' shares of the rows."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.grouped import GROUPS, GroupedAllocation
from embsearch_dist.methods.budget import check_feasible, knapsack, parse_budget, total_cost
from embsearch_dist.methods.directions import principal
from embsearch_dist.methods.ihas.retraining import read_kept
from embsearch_dist.methods.ihas_widths import widths_stage
from embsearch_dist.methods.ihas_widths.config import IHASWidthsConfig
from embsearch_dist.methods.ihas_widths.joined import TruncatedGroups, joined
from embsearch_dist.methods.ihas_widths.widths_stage import most_open
from embsearch_dist.methods.truncated import Changes, TruncatedModel
from embsearch_dist.methods.utilities.search_stage import Searcher
from embsearch_dist.methods.utilities.worth import choose
from embsearch_dist.methods.widest import Moments, Sample
from embsearch_dist.report import write_report
from tests.factories import one_rank, prepared, rank_context, small_config, small_schema
from tests.method_contract import Case
from tests.planted import PLANTED, SCHEMA, planted_model

WIDTHS = [0, 1, 2, 4, 8]
COSTS = torch.tensor([[0, 4, 8], [0, 2, 4]] * 2, dtype=torch.float64)  # two groups of the same two fields
WORTH = torch.tensor([[0, 5, 6.5], [0, 3, 4], [0, 0.1, 0.1], [0, 0.2, 0.2]], dtype=torch.float64)


def test_one_knapsack_buys_for_all_groups_and_each_keeps_a_field() -> None:
    assert knapsack(WORTH, COSTS, 12) == [2, 2, 0, 0]  # 10.5: all for group 0
    assert knapsack(WORTH, COSTS, 12, groups=2) == [2, 1, 0, 1]  # 9.7: 2 of 12 are for the cheapest table of group 1
    assert knapsack(WORTH, COSTS, 4, groups=2) == [0, 1, 0, 1]  # 3.2, where 5 would be all for group 0
    with pytest.raises(ValueError, match="no choice costs at most 3"):
        knapsack(WORTH, COSTS, 3, groups=2)


def test_a_budget_that_not_every_group_can_have_a_table_of_is_refused() -> None:
    schema = small_schema(30, 10)
    check_feasible(parse_budget("40", schema), schema, [0, 2, 4], groups=2)
    with pytest.raises(UserError, match="the narrowest allocation of 2 groups of rows needs 40 parameters"):
        check_feasible(parse_budget("39", schema), schema, [0, 2, 4], groups=2)


def test_the_choice_for_groups_is_the_best_that_any_limit_holds() -> None:
    generator = torch.Generator().manual_seed(1)
    for limit in range(4, 25):
        worth = torch.rand(4, 3, generator=generator, dtype=torch.float64).cummax(1).values
        worth -= worth[:, :1].clone()
        worth[2:] *= limit % 3  # now and then a group is worth nothing
        choice = choose(worth, COSTS, limit, groups=2)
        every = [c for c in itertools.product(range(3), repeat=4) if any(c[:2]) and any(c[2:])]
        best = max(sum(float(worth[f, j]) for f, j in enumerate(c)) for c in every if total_cost(c, COSTS) <= limit)
        assert sum(float(worth[f, j]) for f, j in enumerate(choice)) == pytest.approx(best, abs=1e-9)
        assert total_cost(choice, COSTS) <= limit and any(choice[:2]) and any(choice[2:])


def test_what_a_group_loses_counts_by_its_share_of_the_rows() -> None:
    def changes(loss: float, gain: float, spread: float, rows: int) -> Changes:
        second = torch.zeros(1, 2, 2, dtype=torch.float64)
        second[0, 0, 0] = gain**2 + spread**2
        return Changes(loss, rows, torch.tensor([[gain, 0.0]], dtype=torch.float64), second)

    both = joined([changes(0.4, 0.02, 0.1, 301), changes(0.8, 0.04, 0.2, 101)], [0.75, 0.25])
    assert both.loss == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    assert both.gain(0, 0, 1) == pytest.approx((0.015, 0.75 * 0.1 / 300**0.5))
    assert both.gain(1, 0, 1) == pytest.approx((0.01, 0.25 * 0.2 / 100**0.5))
    assert both.rows == 402


@pytest.fixture(scope="module")
def groups() -> TruncatedGroups:
    """Of two made models: what one group needs of fields 6, 7, 4, 5, 2, 3 the other needs of 0 to 5."""
    found = []
    for pairs in (((0, 1), (2, 3), (4, 5)), ((6, 7), (4, 5), (2, 3))):
        model, batches = planted_model(pairs=pairs)
        sample = Sample.of(model, iter(batches), torch.device("cpu"))
        moments = Moments(8, 8, torch.device("cpu"))
        moments.add(sample.x)
        found.append(TruncatedModel(model, sample, principal(moments), one_rank()))
    return TruncatedGroups(found)


BOTH = [*PLANTED, 0, 0, 4, 4, 2, 2, 1, 1]


def test_the_planted_widths_of_both_groups_are_found_and_one_budget_holds_them(groups: TruncatedGroups) -> None:
    searcher = Searcher(SCHEMA, IHASWidthsConfig(candidates=WIDTHS, width=8), groups, groups=2)
    assert searcher.ranks(searcher.find(None)) == BOTH
    enough = 30 * sum(BOTH)
    assert searcher.ranks(searcher.find(parse_budget(str(enough), SCHEMA))) == BOTH
    for limit in (enough - 1, enough // 2, 60):
        found = searcher.ranks(searcher.find(parse_budget(str(limit), SCHEMA)))
        assert 30 * sum(found) <= limit and sum(found[:8]) and sum(found[8:])
        assert not any(w for w, planted in zip(found, BOTH, strict=True) if not planted)


def test_a_group_whose_rows_are_of_one_class_is_told(groups: TruncatedGroups) -> None:
    assert groups.of_one_class() == []
    one = copy.copy(groups.groups[1])
    one.sample = replace(one.sample, label=torch.ones_like(one.sample.label))
    assert TruncatedGroups([groups.groups[0], one]).of_one_class() == [1]


def test_a_small_group_is_measured_on_a_row_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    search = IHASWidthsConfig(rows=1000, basis_rows=500)
    model = SimpleNamespace(extra=0)
    runs = []
    for rows in ({"train": 999_990, "validation": 99_990}, {"train": 10, "validation": 10}):
        runs.append(SimpleNamespace(schema=SimpleNamespace(rows=rows)))
    asked = []

    def cut_down(run: Any, model: Any, rows: int, basis_rows: int) -> tuple[None, None]:
        asked.append((rows, basis_rows))
        return None, None

    monkeypatch.setattr(widths_stage, "group_runs", lambda run: runs)
    monkeypatch.setattr(widths_stage, "load_widest_of", lambda run: None)
    monkeypatch.setattr(widths_stage, "cut_down", cut_down)
    monkeypatch.setattr(widths_stage, "TruncatedGroups", list)
    monkeypatch.setattr(widths_stage, "by_losses", lambda *_: None)
    whole: Any = SimpleNamespace(
        config=SimpleNamespace(search=search, model=model), context=rank_context(0, 4), schema=None
    )
    widths_stage.make_searcher(whole)
    assert asked == [(1000, 500), (4, 4)]


def test_a_table_of_one_group_is_nothing_to_the_rows_of_another(groups: TruncatedGroups) -> None:
    whole, cut = [8] * 16, [8] * 8 + [0] * 8
    before, after = groups.calibrated(whole), groups.calibrated(cut)
    own = len(groups.groups[0].sample.label)
    assert torch.equal(before[:own], after[:own]) and float((after[own:] - before[own:]).mean()) > 0.1
    seen = groups.groups[1].sample.known
    assert seen is not None
    assert torch.equal(groups.knowing([3, 11]), torch.cat([groups.groups[0].sample.known[3], seen[3]]))  # type: ignore[index]
    assert bool(groups.knowing([11])[:own].all())


def test_a_table_inherits_the_dimensions_that_are_open_most_often() -> None:
    shares = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.2, 0.7], [0.3, 0.3, 0.4, 0.0, 0.0, 0.0]])
    assert most_open(shares, [2, 0, 1, 3]).int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("ihas_widths", str(prepared(tmp_path_factory)), ("search.budget=ues-3",))


def test_another_budget_only_searches_again_and_all_groups_share_it(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for budget in ("ues-3", "200"):  # the second holds less than what the first finds
        capsys.readouterr()
        run = case.search(tmp_path, one_rank(), f"search.budget={budget}", "search.groups.inherit=true")
        found = GroupedAllocation.load(run.dir / GROUPS, run.schema)
        sizes.append(found.total("parameters"))
        limit = 200 if budget == "200" else Allocation.uniform(run.schema, 3).total("parameters")
        assert 0 < sizes[-1] <= limit
        assert found.provenance["budget"] == budget and found.provenance["method"] == "ihas_widths"
        read_kept(run, found)  # as many columns as the widths say
    assert capsys.readouterr().out.count("done before, skipped") == 4 and sizes[1] < sizes[0]
    page = write_report([tmp_path]).read_text()
    assert "<h3>widest group-1</h3>" in page
    assert "What each width is worth" in page
    with pytest.raises(UserError, match=r"stage 'widest' made with other settings: search.groups.k was 2, now 3"):
        case.search(tmp_path, one_rank(), "search.groups.inherit=true", "search.groups.k=3")


def test_with_one_group_there_is_one_allocation(case: Case, tmp_path: Path) -> None:
    run = case.search(tmp_path, one_rank(), "search.groups.k=1")
    found = Allocation.load(run.dir / "allocation.json", run.schema)
    assert not (run.dir / GROUPS).exists()
    assert 0 < found.total("parameters") <= Allocation.uniform(run.schema, 3).total("parameters")
    assert read_json(run.dir / "groups" / "open.json")["open"]


def test_a_precision_of_its_own_for_every_table_is_refused() -> None:
    with pytest.raises(UserError, match="search.precision: mixed is for one model"):
        small_config("no-data", "no-run", "search.precision=mixed", method="ihas_widths")
