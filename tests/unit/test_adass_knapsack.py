"""AdaS&S's third finder: measured losses of subnets with inherited weights, and a knapsack over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from embsearch_dist.errors import UserError
from embsearch_dist.files import read_json
from embsearch_dist.methods.adass.config import AdassConfig, PolicyConfig
from embsearch_dist.methods.adass.knapsack import InheritedLosses, cheapest_alike, settings
from embsearch_dist.methods.adass.scorer import SubnetScorer
from embsearch_dist.methods.adass.scoring import Scoring
from embsearch_dist.methods.adass.search_stage import Searcher
from embsearch_dist.methods.adass.whole_scorer import WholeScorer
from embsearch_dist.methods.budget import cost_table, parse_budget, total_cost
from embsearch_dist.methods.utilities.search_stage import by_losses
from tests.factories import one_rank, prepared, small_schema
from tests.method_contract import Case
from tests.unit.test_scorer import CANDIDATES, SCHEMA, sample, supernet

ALL = torch.ones(3, len(CANDIDATES), dtype=torch.bool)


def scorer_of(whole: bool = False, **options: Any) -> Scoring:
    if whole:
        return WholeScorer(supernet("none"), sample(), one_rank())
    return SubnetScorer(supernet("none"), sample(), one_rank(), **options)


@pytest.mark.parametrize("whole", [False, True])
def test_changes_are_the_calibrated_losses_of_the_changed_subnets(whole: bool) -> None:
    scorer = scorer_of(whole)
    model = InheritedLosses(scorer, CANDIDATES, ALL)
    base = [3, 1, 2]
    found = model.changes(base, CANDIDATES)
    own = model.calibrated([CANDIDATES[j] for j in base])
    assert found.loss == pytest.approx(float(own.mean()), rel=1e-6) and found.rows == 237
    # The scale and shift that fit the base best are those of all changes around it.
    x = scorer.logits(torch.tensor([base]))[0].double()
    fitted = binary_cross_entropy_with_logits(x, model.labels.double())
    assert found.loss < float(fitted)
    y = torch.stack([x, torch.ones_like(x)], 1)
    for f in range(3):
        for j in range(4):
            choice = [j if k == f else base[k] for k in range(3)]
            logits = scorer.logits(torch.tensor([choice]))[0].double()
            # Undo the link: the base's calibrated losses give scale and shift by least squares on its logits.
            target = torch.where(model.labels > 0, -(own.expm1()).log(), own.expm1().log())
            scale, shift = torch.linalg.lstsq(y, target[:, None]).solution[:, 0]
            losses = binary_cross_entropy_with_logits(scale * logits + shift, model.labels.double(), reduction="none")
            assert float(found.more[f, j]) == pytest.approx(float((losses - own).mean()), abs=2e-4)


def test_a_field_is_judged_by_rows_that_know_its_value() -> None:
    model = InheritedLosses(scorer_of(), CANDIDATES, ALL)
    base = [3, 3, 3]
    every, known = model.changes(base, CANDIDATES), model.changes(base, CANDIDATES, known=True)
    assert known.counts is not None and every.counts is not None
    assert known.counts.tolist() == model.known.sum(1).tolist() != every.counts.tolist()
    assert not torch.equal(known.more, every.more)
    assert torch.equal(model.known_shares(), known.counts / 237)
    both = model.knowing([0, 2])
    assert torch.equal(both, model.known[0] & model.known[2]) and model.knowing([]).all()


def test_candidates_that_cannot_differ_have_the_losses_of_the_cheapest() -> None:
    allowed = torch.tensor([[True, True, False, True], [True, True, False, False], [True] * 4])
    assert cheapest_alike(allowed) == [[0, 1, 1, 3], [0, 1, 1, 1], [0, 1, 2, 3]]
    model = InheritedLosses(scorer_of(), CANDIDATES, allowed)
    found = model.changes([3, 1, 3], CANDIDATES)
    assert found.more[0, 1] == found.more[0, 2] and found.more[1, 1] == found.more[1, 2] == found.more[1, 3] == 0
    assert model.subnet([3, 6, 3]) == [1, 1, 2]


def test_rows_that_fitted_heads_do_not_judge() -> None:
    scorer = scorer_of(refit="linear")
    model = InheritedLosses(scorer, CANDIDATES, ALL)
    assert 0 < model.own_rows == len(model.labels) == model.known.shape[1] < 237
    assert model.changes([3, 3, 3], CANDIDATES).rows == len(scorer.labels)


class Planted:
    """Stands for a supernet's scorer: a subnet's logits are a sum over its fields of what each candidate tells."""

    def __init__(self, gains: list[list[float]], rows: int = 4000, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.gains, self.fields, self.context = torch.tensor(gains), len(gains), one_rank()
        self.signal = torch.randn(self.fields, rows, generator=generator)
        chance = (self.gains[:, -1] @ self.signal).sigmoid()
        self.labels = self.own_labels = (torch.rand(rows, generator=generator) < chance).float()
        self.known, self.scored = torch.ones(self.fields, rows, dtype=torch.bool), rows
        self.archive: dict[tuple[int, ...], dict[str, float]] = {}

    def logits_near(self, base: list[int], choices: torch.Tensor) -> torch.Tensor:
        return self.gains.gather(1, choices.T).T @ self.signal

    def score(self, choices: torch.Tensor) -> list[dict[str, float]]:
        logits = self.logits_near([], choices)
        losses = [float(binary_cross_entropy_with_logits(row, self.labels)) for row in logits]
        return [{"auc": 1 - loss, "logloss": loss, "accuracy": 0.5} for loss in losses]

    def score_near(self, base: list[int], choices: torch.Tensor) -> list[dict[str, float]]:
        return [{**m, "gain": 0.0, "gain_se": 0.0} for m in self.score(choices)]


GAINS = [[0.0, 0.9, 0.9, 0.9], [0.0, 0.3, 0.6, 0.9], [0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 1.2, 1.3]]
PLANTED = small_schema(100, 40, 7, 300)


def planted(allowed: torch.Tensor | None = None, **policy: Any) -> Searcher:
    config = AdassConfig(candidates=CANDIDATES, policy=PolicyConfig(finder="knapsack", **policy))
    mask = torch.ones(4, 4, dtype=torch.bool) if allowed is None else allowed
    held_out, training = Planted(GAINS), Planted(GAINS, seed=1)
    again = torch.full((4,), 50.0, dtype=torch.float64)
    models = (
        InheritedLosses(held_out, CANDIDATES, mask),  # type: ignore[arg-type]
        InheritedLosses(training, CANDIDATES, mask, again),  # type: ignore[arg-type]
    )
    measured = by_losses(PLANTED, settings(config), *models)
    return Searcher(PLANTED, config, held_out, mask, 0, measured)  # type: ignore[arg-type]


def test_the_knapsack_finds_the_widths_that_tell_something() -> None:
    found = planted().find(0)
    # The field without a signal is kept at its narrowest: no row speaks against it.
    assert found.choice[0] == 1 and found.choice[1] == 3 and found.choice[2] <= 1 and found.choice[3] >= 2
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(4))


@pytest.mark.parametrize("budget", ["20%", "900", "40%"])
def test_the_knapsack_obeys_a_budget_and_takes_no_candidate_that_is_not_allowed(budget: str) -> None:
    parsed = parse_budget(budget, PLANTED)
    allowed = torch.tensor([[True, True, False, True]] * 4)
    search, done = planted(allowed), []
    found = search.find(0, parsed, tick=done.append)
    costs = cost_table(PLANTED, CANDIDATES, parsed.resource)
    assert 0 < total_cost(found.choice, costs) <= parsed.limit
    assert 2 not in found.choice and not found.probabilities[:, 2].any()
    assert 0 < sum(done) <= search.subnets()


def test_what_a_budget_leaves_is_spent_where_values_are_new() -> None:
    one, other = planted(), planted(spend=False)
    for search in (one, other):
        assert search.measured is not None
        held_out = search.measured.model
        assert isinstance(held_out, InheritedLosses)
        held_out.known[1] = torch.arange(4000) < 40  # hardly a row knows this field, so no width of it shows
    budget = parse_budget("100%", PLANTED)
    assert other.find(0, budget).choice[1] < one.find(0, budget).choice[1] == 3


def test_a_finder_without_a_supernet_of_its_own_is_refused() -> None:
    config = AdassConfig(candidates=CANDIDATES, policy=PolicyConfig(finder="knapsack"))
    with pytest.raises(UserError, match="knapsack needs a supernet that search.py has trained"):
        Searcher(SCHEMA, config, scorer_of())


def test_a_search_of_its_own_keeps_the_budget_and_leaves_the_files_of_any_other(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("adass", str(prepared(tmp_path_factory)), short=True)
    case.search(tmp_path, one_rank(), "search.policy.finder=knapsack", "search.pareto=[30%]")
    points = read_json(tmp_path / "search" / "pareto.json")["points"]
    assert [p["name"] for p in points] == ["adass", "adass-30pct"]
    assert all(0 < p["parameters"] <= p["budget"] for p in points)
    assert points[0]["widths"] == read_json(tmp_path / "allocation.json")["widths"]
    assert "search: a knapsack over measured losses on " in capsys.readouterr().out
