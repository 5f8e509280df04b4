"""Widths and precisions in one search: no budget is exceeded, whatever it counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.errors import UserError
from embsearch_dist.methods.adass.config import AdassConfig
from embsearch_dist.methods.budget import parse_budget, total_cost
from embsearch_dist.methods.found import budgets
from embsearch_dist.methods.optembed.config import OptEmbedConfig
from embsearch_dist.methods.truncated import Changes, Truncated
from embsearch_dist.methods.utilities.config import UtilitiesConfig
from embsearch_dist.methods.utilities.search_stage import Searcher, budgets_of, options_of
from embsearch_dist.methods.utilities.worth import choose, rising, spend, supported, within
from tests.factories import one_rank, small_schema


class MadeUp(Truncated):
    """Of random losses: every choice is measured around the same ones, ``[F, T]``."""

    def __init__(self, losses: torch.Tensor) -> None:
        self.losses, self.context = losses, one_rank()
        self.fields, self.rows, self.own_rows = len(losses), 10**8, 10

    def calibrated(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> torch.Tensor:
        return torch.zeros(self.own_rows, dtype=torch.float64)

    def metrics(self, ranks: Sequence[int], precisions: Sequence[str] = ()) -> dict[str, float]:
        return {}

    def knowing(self, fields: Sequence[int]) -> torch.Tensor:
        return torch.ones(self.own_rows, dtype=torch.bool)

    def known_shares(self) -> torch.Tensor:
        return torch.zeros(self.fields, dtype=torch.float64)

    def again(self) -> torch.Tensor:
        return torch.full((self.fields,), 9.0, dtype=torch.float64)

    def changes(self, choice: Sequence[int], candidates: Sequence[int], *others: object, **more: object) -> Changes:
        own = self.losses.gather(1, torch.tensor(list(choice))[:, None])
        by = self.losses - own
        return Changes(float(own.sum()), self.rows, by, by[:, :, None] * by[:, None, :])


class AllKnown(MadeUp):
    """Training rows: they know every value, of which the measured ones know none, so that budgets are spent."""

    def known_shares(self) -> torch.Tensor:
        return torch.ones(self.fields, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(12))
def test_a_mixed_search_obeys_budgets_in_parameters_and_in_bytes(seed: int) -> None:
    """By served bytes 24 columns at int4 come before 16 at int8, by parameters behind them."""
    generator = torch.Generator().manual_seed(seed)
    schema = small_schema(*(int(10 ** (1 + 3 * torch.rand(1, generator=generator))) for _ in range(3)))
    candidates = [0, 4, 8, 12, 16, 20, 24, 28, 32][seed % 2 :]
    config = UtilitiesConfig(candidates=candidates, width=32, precision="mixed")
    options = options_of(config, 0)
    losses, trained = torch.rand(2, 3, len(options), generator=generator, dtype=torch.float64)
    if seed % 3 == 0:  # columns count, precision does not
        losses = torch.tensor([[1 / (1 + o.width) for o in options]] * 3, dtype=torch.float64)
    searcher = Searcher(schema, config, MadeUp(losses), trained=AllKnown(trained))
    for text in ("ues-4", "ues-9", "15%", "30%", "47%", "60%", "90%", "120%"):
        spent = parse_budget(text, schema, precision="mixed")
        for budget in (spent, parse_budget(str(parse_budget(text, schema).limit), schema, precision="mixed")):
            if float(searcher.costs(budget).min(1).values.sum()) > budget.limit:
                continue  # refused before a search
            choice = searcher.find(budget)
            widths = dict(zip(schema.names, searcher.ranks(choice), strict=True))
            found = Allocation(schema, widths, precisions=searcher.precisions_of(choice))
            assert found.total(budget.resource) == total_cost(choice, searcher.costs(budget)) <= budget.limit


def test_of_options_that_cost_the_same_parameters_the_finer_one_is_taken() -> None:
    schema = small_schema(*[30] * 8)
    config = UtilitiesConfig(candidates=[0, 16, 24, 32], width=32, precision="mixed")
    losses = [[1 / (1 + o.width) for o in options_of(config, 0)]] * 8
    searcher = Searcher(schema, config, MadeUp(torch.tensor(losses, dtype=torch.float64)))
    assert [(o.width, o.precision) for o in searcher.options[1:4]] == [(16, "int4"), (24, "int4"), (16, "int8")]
    choice = searcher.find(parse_budget(str(8 * 30 * 20), schema))
    assert sorted(searcher.ranks(choice)) == [16] * 4 + [24] * 4
    assert set(searcher.precisions_of(choice).values()) == {"int8"}


def test_no_choice_costs_more_than_the_limit_whatever_worths_and_costs_are() -> None:
    generator = torch.Generator().manual_seed(3)
    for case in range(60):
        worth = torch.rand(3, 5, generator=generator, dtype=torch.float64)
        worth = (worth * 3).round() if case % 2 else worth  # ties
        costs = torch.randint(1, 50, (3, 5), generator=generator).double()
        if case % 3:
            costs[:, 0] = 0
        least, most = float(costs.min(1).values.sum()), float(costs.max(1).values.sum())
        limit = float(int(least + (most - least) * float(torch.rand(1, generator=generator))))
        every = [c for c in itertools.product(range(5), repeat=3) if 0 < total_cost(c, costs) <= limit]
        if not every or limit < float(costs[:, 1].min()):
            continue
        choice = choose(worth, costs, limit)
        assert total_cost(choice, costs) <= limit
        best = max(sum(float(worth[f, j]) for f, j in enumerate(c)) for c in every)
        assert sum(float(worth[f, j]) for f, j in enumerate(choice)) == pytest.approx(best, abs=1e-9)
        around = Changes(0.5, 100, -worth, torch.zeros(3, 5, 5, dtype=torch.float64))
        assert total_cost(spend(choice, around, [0, 8, 4, 16, 12], costs, limit), costs) <= limit


def test_a_choice_beyond_the_limit_is_an_error() -> None:
    costs = torch.tensor([[0.0, 10], [0.0, 10]], dtype=torch.float64)
    assert within([1, 0], costs, 10) == [1, 0]
    with pytest.raises(ValueError, match="costs 20 was found under a limit of 19"):
        within([1, 1], costs, 19)


def test_worth_is_carried_from_narrower_options_alone() -> None:
    """Of widths 8, 24 and 16 at rising cost the last is no better than 24: it has the worth of 8."""
    more = torch.tensor([[0.5, 0.3, 0.1, 0.2]], dtype=torch.float64)
    around = Changes(0.5, 10**6, more, more[:, :, None] * more[:, None, :])
    assert supported(around, 1.0, None, [0, 8, 24, 16])[0].tolist() == pytest.approx([0, 0.2, 0.4, 0.2])
    assert supported(around, 1.0)[0].tolist() == pytest.approx([0, 0.2, 0.4, 0.4])
    assert rising(-more[0], [0, 8, 24, 16]).tolist() == pytest.approx([-0.5, -0.3, -0.1, -0.2])


def test_a_budget_that_only_int4_keeps_is_for_searches_that_choose_precisions() -> None:
    schema = small_schema(1000, 500)  # a row of 16 columns takes 32 bytes at int8, 16 at int4
    config = UtilitiesConfig(candidates=[16, 32], width=32, precision="mixed", budget="30KB")
    ((_, budget),) = budgets_of(config, schema, 0)
    assert budget is not None and budget.limit == 30_000
    adass = AdassConfig(candidates=[16, 32], precision="mixed", budget="30KB")
    optembed = OptEmbedConfig(precision="mixed", pareto=["20KB"])
    for search, least in ((adass, "48,000"), (optembed, "24,000")):
        with pytest.raises(UserError, match=f"needs {least} served_mixed"):
            budgets(search, "found", schema, 0)
