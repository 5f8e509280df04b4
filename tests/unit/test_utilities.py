"""Width utilities: planted widths are found, evidence is asked for, budgets hold, and only the search is repeated."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.files import read_sealed
from embsearch_dist.methods import METHODS, widest
from embsearch_dist.methods.budget import parse_budget, total_cost
from embsearch_dist.methods.directions import Bases, principal
from embsearch_dist.methods.fallback import widest_within
from embsearch_dist.methods.stages import check_stages, run_stages
from embsearch_dist.methods.truncated import Changes, Truncated, TruncatedModel, as_stored
from embsearch_dist.methods.utilities.config import UtilitiesConfig
from embsearch_dist.methods.utilities.search_stage import Searcher
from embsearch_dist.methods.utilities.worth import by_heart, choose, harming, mostly_new, rising, spend, supported
from embsearch_dist.methods.widest import Moments, Sample
from embsearch_dist.report import write_report
from tests.factories import one_rank, open_run, prepared, small_config
from tests.method_contract import Case
from tests.planted import PLANTED, SCHEMA, planted_model

WIDTHS = [0, 1, 2, 4, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory)


@pytest.fixture(scope="module")
def planted() -> Searcher:
    model, batches = planted_model()
    sample = Sample.of(model, iter(batches), torch.device("cpu"))
    moments = Moments(8, 8, torch.device("cpu"))
    moments.add(sample.x)
    truncated = TruncatedModel(model, sample, principal(moments), one_rank())
    return Searcher(SCHEMA, UtilitiesConfig(candidates=WIDTHS, width=8), truncated, None)


def test_the_planted_widths_are_found(planted: Searcher) -> None:
    assert planted.ranks(planted.find(None)) == PLANTED


def test_a_budget_that_holds_the_planted_widths_finds_them_and_a_smaller_one_is_held(planted: Searcher) -> None:
    enough = sum(30 * w for w in PLANTED)
    assert planted.ranks(planted.find(parse_budget(str(enough), SCHEMA))) == PLANTED
    for share in (0.8, 0.5, 0.2):
        budget = parse_budget(str(int(share * enough)), SCHEMA)
        found = planted.ranks(planted.find(budget))
        assert 0 < 30 * sum(found) <= budget.limit
        assert found[6:] == [0, 0]


def test_with_mixed_precision_each_field_gets_one_and_served_bytes_hold(planted: Searcher) -> None:
    config = UtilitiesConfig(candidates=[0, 4, 8], width=8, precision="mixed")
    searcher = Searcher(SCHEMA, config, planted.model)
    assert [(o.width, o.precision) for o in searcher.options[:3]] == [(0, ""), (4, "int8"), (4, "int4")]
    for text in ("ues-8", "50%"):
        budget = parse_budget(text, SCHEMA, precision="mixed")
        choice = searcher.find(budget)
        widths = dict(zip(SCHEMA.names, searcher.ranks(choice), strict=True))
        found = Allocation(SCHEMA, widths, precisions=searcher.precisions_of(choice))
        assert found.total("served_mixed") == total_cost(choice, searcher.costs(budget)) <= budget.limit
        assert set(found.precisions) == set(found.kept)


def test_rounding_costs_more_in_fewer_bits_and_nothing_in_none() -> None:
    x = torch.randn(3, 500, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(as_stored(x, 8, "fp32"), x) and torch.equal(as_stored(x, 0, "int4"), x)
    int8, int4 = as_stored(x, 6, "int8"), as_stored(x, 6, "int4")
    assert torch.equal(int8[..., 6:], x[..., 6:])  # what is cut off anyway stays as it is
    errors = [float((y - x)[..., :6].square().mean().sqrt()) for y in (int8, int4)]
    assert 1e-4 < errors[0] < 0.01 < errors[1] < 0.2


def test_every_measurement_tells_how_many_rows_it_has_passed(planted: Searcher) -> None:
    passed: list[int] = []
    fresh = replace(planted, measured={}, tick=passed.append)
    fresh.find(None)
    assert len(fresh.measured) >= 2 and sum(passed) == len(fresh.measured) * len(planted.model.sample.label)


def test_saliency_orders_the_planted_fields_too(planted: Searcher) -> None:
    model, _ = planted_model()
    by_saliency = Searcher(SCHEMA, planted.config, planted.model, planted.model.saliency(model))
    worth = by_saliency.worth_at_full_width()
    assert worth[6:].abs().max() < 1e-6 < worth[:6, 1].min()
    # Directions past the planted rank are worth nothing.
    for field, rank in enumerate(PLANTED[:6]):
        assert worth[field, -1] == pytest.approx(float(worth[field, WIDTHS.index(rank)]), rel=1e-3)


def changes(gain: float, spread: float, rows: int = 100) -> Changes:
    """Two candidates of one field: the wider one has ``gain`` less loss, a difference of deviation ``spread``."""
    second = torch.zeros(1, 2, 2, dtype=torch.float64)
    second[0, 0, 0] = gain**2 + spread**2
    return Changes(0.5, rows, torch.tensor([[gain, 0.0]], dtype=torch.float64), second)


def test_a_wider_candidate_counts_only_beyond_its_standard_error() -> None:
    assert supported(changes(0.011, 0.1), 1.0).tolist() == [[0, pytest.approx(0.011)]]
    assert supported(changes(0.009, 0.1), 1.0).tolist() == [[0, 0]]
    assert supported(changes(0.009, 0.1), 0.0).tolist() == [[0, pytest.approx(0.009)]]
    assert supported(changes(-0.5, 0.1), 1.0).tolist() == [[0, 0]]


def test_one_row_is_no_evidence() -> None:
    """A small group may have one measured row, and a field one row that knows its value: no spread is not no error."""
    assert supported(changes(0.5, 0.0, rows=1), 1.0).tolist() == [[0, 0]]
    assert supported(changes(0.5, 0.0, rows=1), 0.0).tolist() == [[0, pytest.approx(0.5)]]
    assert supported(changes(0.5, 0.0, rows=2), 1.0).tolist() == [[0, pytest.approx(0.5)]]
    held = torch.tensor([0.02])
    assert supported(changes(-0.5, 0.0, rows=1), 1.0, held).tolist() == [[0, pytest.approx(0.02)]]
    assert not harming([0], changes(-0.5, 0.0, rows=1), 1.0).any()
    one = replace(changes(0.5, 0.0), counts=torch.tensor([1.0]))
    assert supported(one, 1.0).tolist() == [[0, 0]]


def test_a_field_is_dropped_only_where_the_rows_say_that_it_does_harm() -> None:
    held = torch.tensor([0.02])
    unclear, harmful = changes(0.005, 0.1), changes(-0.02, 0.1)
    assert supported(unclear, 1.0, held).tolist() == [
        [0, pytest.approx(0.02)]
    ]  # new users: nothing speaks against them
    assert supported(changes(-0.005, 0.1), 1.0, held).tolist() == [[0, pytest.approx(0.02)]]
    assert supported(harmful, 1.0, held).tolist() == [[0, 0]]  # learned by heart
    assert supported(changes(0.03, 0.1), 1.0, held).tolist() == [[0, pytest.approx(0.03)]]


def test_the_best_affordable_choice_is_taken_and_of_equals_the_cheapest() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.tensor([[0, 5, 9], [0, 2, 30], [0, 1, 3]], dtype=torch.float64)
    for _ in range(20):
        worth = 1e-5 * torch.rand(3, 3, generator=generator, dtype=torch.float64).cummax(1).values
        choice = choose(worth, costs, 12)
        assert total_cost(choice, costs) <= 12
        every = [c for c in itertools.product(range(3), repeat=3) if 0 < total_cost(c, costs) <= 12]
        best = max(sum(float(worth[f, j]) for f, j in enumerate(c)) for c in every)
        assert sum(float(worth[f, j]) for f, j in enumerate(choice)) == pytest.approx(best, abs=1e-9)
    assert choose(torch.tensor([[0.0, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.float64), costs, None) == [1, 0, 2]


def test_not_every_field_is_dropped_even_where_nothing_helps() -> None:
    costs = torch.tensor([[0, 5], [0, 2]], dtype=torch.float64)
    assert choose(torch.zeros(2, 2, dtype=torch.float64), costs, 3) == [0, 1]


def test_what_a_budget_leaves_goes_to_kept_fields_by_what_training_saves() -> None:
    costs = torch.tensor([[0, 10, 20, 40]] * 4, dtype=torch.float64)
    more = torch.tensor(
        [
            [0.5, 0.0, -0.02, -0.03],  # kept at its narrowest: training saves most by the first step
            [0.5, 0.1, 0.0, -0.01],
            [0.0, -0.5, -0.6, -0.7],  # dropped: it stays so, whatever training would save
            [0.5, 0.0, 0.01, 0.02],  # wider is worse in training, too: nothing is paid for it
        ],
        dtype=torch.float64,
    )
    around = Changes(0.6, 100, more, torch.zeros(4, 4, 4, dtype=torch.float64))
    chosen, widths = [1, 2, 0, 1], [0, 2, 4, 8]
    assert spend(chosen, around, widths, costs, 40) == chosen
    assert spend(chosen, around, widths, costs, 59) == [2, 2, 0, 1]
    assert spend(chosen, around, widths, costs, 90) == [3, 3, 0, 1]
    for limit in range(40, 110):
        found = spend(chosen, around, widths, costs, limit)
        assert total_cost(found, costs) <= limit and all(a >= b for a, b in zip(found, chosen, strict=True))


def with_ids_of(model: Truncated, known: torch.Tensor) -> TruncatedModel:
    """The planted model with other rows known, ``[F, n]``."""
    assert isinstance(model, TruncatedModel)
    return TruncatedModel(planted_model()[0], replace(model.sample, known=known), model.bases, one_rank())


def test_what_evidence_leaves_of_a_budget_is_spent_only_where_values_are_new(planted: Searcher) -> None:
    budget = parse_budget(str(sum(30 * w for w in PLANTED) + 400), SCHEMA)
    costs, narrow = planted.costs(budget), [WIDTHS.index(w) for w in [1, 1, 2, 2, 4, 2, 0, 0]]
    known = torch.ones(8, planted.model.rows, dtype=torch.bool)
    seen = replace(planted, trained=with_ids_of(planted.model, known), measured={})
    assert seen._spent(narrow, costs, float(budget.limit)) == narrow
    known = known.clone()
    known[4, : 6 * planted.model.rows // 10] = False
    new = replace(seen, model=with_ids_of(planted.model, known), measured={})
    assert new.ranks(new._spent(narrow, costs, float(budget.limit))) == PLANTED
    for searcher in (seen, new):
        assert searcher.ranks(searcher.find(budget)) == PLANTED
        assert searcher.ranks(searcher.find(None)) == PLANTED


def test_values_are_new_only_where_training_rows_knew_more_of_the_field() -> None:
    held_out, trained = torch.tensor([0.2, 0.2, 0.2, 0.9]), torch.tensor([0.3, 0.9, 0.9, 1.0])
    assert mostly_new([4, 4, 0, 4], held_out, trained).tolist() == [False, True, False, False]
    assert planted_shares(0.25) == pytest.approx([0.25] + [1.0] * 7)


def test_training_rows_have_no_say_where_ids_hardly_come_again(planted: Searcher) -> None:
    """The number of an order, with a value a row, is dropped and gets none of the budget."""
    assert by_heart(torch.tensor([0.0, 0.9, 1.0, 9.0, float("nan")])).tolist() == [True, True, False, False, False]
    known = torch.ones(8, planted.model.rows, dtype=torch.bool)
    trained = with_ids_of(planted.model, known.clone())
    known[4:6] = False  # all values of two fields are new
    new = replace(planted, model=with_ids_of(planted.model, known), trained=trained, measured={})
    costs, limit = new.costs(None), float(30 * sum(PLANTED))
    chosen = [WIDTHS.index(w) for w in PLANTED]
    chosen[4:6] = [1, 1]
    assert min(new._spent(chosen, costs, limit)[4:6]) > 1
    alone = torch.arange(8) == 4
    one = replace(new, alone=alone, measured={})._spent(chosen, costs, limit)
    assert one[4] == 1 and one[5] > 1
    assert replace(new, alone=torch.ones(8, dtype=torch.bool), measured={})._spent(chosen, costs, limit) == chosen


def planted_shares(share: float) -> list[float]:
    model, batches = planted_model()
    sample = Sample.of(model, iter(batches), torch.device("cpu"))
    known = torch.ones(8, len(sample.label), dtype=torch.bool)
    known[0, int(share * len(sample.label)) :] = False
    bases = Bases.of(torch.zeros(8, 8), torch.eye(8).repeat(8, 1, 1), torch.eye(8).repeat(8, 1, 1))
    return TruncatedModel(model, replace(sample, known=known), bases, one_rank()).known_shares().tolist()


def test_nothing_is_spent_on_columns_that_save_no_more_than_rounding() -> None:
    """A table of few values has few directions: its losses at wider candidates differ by rounding alone."""
    more = torch.tensor([[0.1, 0.0, -2e-9, -8e-9], [0.2, 0.0, -0.05, -0.1]], dtype=torch.float64)
    changes = Changes(0.5, 1000, more, torch.zeros(2, 4, 4, dtype=torch.float64))
    costs = torch.tensor([[0.0, 6.0, 12.0, 24.0], [0.0, 60.0, 120.0, 240.0]], dtype=torch.float64)
    assert spend([1, 1], changes, [0, 2, 4, 8], costs, 1000.0) == [1, 3]
    assert rising(torch.tensor([0.0, 1e-7, 0.5, 0.4])).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5])


def search(data: Path, folder: Path, *overrides: str) -> Allocation:
    small = ["search.width=8", "search.candidates=[0,2,4,8]", "search.rounds=2"]
    run = open_run(small_config(data, folder, *small, *overrides, method="utilities"), one_rank())
    check_stages(METHODS["utilities"](), run)
    run_stages(METHODS["utilities"](), run)
    return Allocation.load(folder / "allocation.json", run.schema)


def test_a_search_trains_once_and_leaves_what_reports_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = search(data, tmp_path)
    assert found.widths["left"] and found.widths["right"] and not found.widths["idle"]
    assert found.provenance["method"] == found.provenance["name"] == "utilities"
    small = search(data, tmp_path, "search.name=small", "search.budget=3%", "search.pareto=[6%]")
    told = capsys.readouterr()
    assert "stage widest: done before, skipped" in told.out
    assert "note: ids of big hardly come again" in told.out
    assert len(re.findall(r"utilities  100%  ([\d,]+)/\1 rows  .*done in", told.err)) == 2
    assert small.total("parameters") <= 0.03 * 32 * sum(small.schema.cardinalities)
    assert small.provenance["budget"] == "3%"
    body = json.loads((tmp_path / "search" / "pareto.json").read_text())
    names = {p["name"]: p["chosen"] for p in body["points"]}
    assert names == {"small": True, "small-6pct": False, "utilities": False}
    assert all(0.5 < p["auc"] < 1 for p in body["points"])
    html = write_report([tmp_path]).read_text()
    assert "What each width is worth" in html and "Training of the widest model" in html
    assert "No search curves" not in html
    for override, key in (("search.width=16", "search.width was 8, now 16"), ("optim.dense_lr=0.5", "optim.dense_lr")):
        with pytest.raises(UserError, match=f"stage 'widest' made with other settings: {key}"):
            search(data, tmp_path, override)


def test_fewer_rows_are_measured_where_memory_holds_no_more_and_it_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(widest, "SAMPLE_BYTES", 4 * 4 * 16 * 120)  # 120 rows of four fields
    search(data, tmp_path, "search.width=16")
    told = capsys.readouterr().out
    assert "on 120 validation rows" in told and "120 rows at most are measured" in told


def test_auto_trains_the_uniform_width_of_the_budget_too_and_says_which_one_to_use(data: Path, tmp_path: Path) -> None:
    case = Case("auto", str(data))
    run = case.search(tmp_path, one_rank())
    figures = case.retrain(run.dir, one_rank())
    final = read_sealed(run.dir / "final.json")
    uniform = f"ues-{widest_within(Allocation.load(run.dir / 'allocation.json', run.schema))}"
    assert sorted(figures) == ["auto", uniform, f"{uniform}-finetuned"] == sorted(final["size"])
    assert final["name"] in figures and "validation" in final["reason"]
    started = {name: "start" in figures[name] for name in figures}
    assert started == {"auto": True, uniform: False, f"{uniform}-finetuned": True}
    assert Path(figures["auto"]["start"]["from"]).name == "widest"
    assert list(case.retrain(run.dir, one_rank(), allocation="ues-2")) == ["ues-2"]


def test_candidates_beyond_the_trained_width_are_refused() -> None:
    with pytest.raises(UserError, match=r"search.width: must be at least the widest candidate \(32\), got 16"):
        small_config("no-data", "no-run", "search.width=16", method="utilities")
