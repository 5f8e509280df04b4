"""Budgets as a user writes them, the exact knapsack, and the local search inside a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from embsearch_dist.errors import UserError
from embsearch_dist.methods.budget import (
    check_feasible,
    cost_table,
    knapsack,
    parse_budget,
    relative_costs,
    total_cost,
)
from tests.factories import small_schema

SCHEMA = small_schema(1000, 100, 50)  # UES-32: 36,800 parameters


@pytest.mark.parametrize(
    ("text", "resource", "limit"),
    [
        ("200000", "parameters", 200_000),
        ("2_000", "parameters", 2000),
        ("2e5", "parameters", 200_000),
        ("200000.0", "parameters", 200_000),
        ("1.5MB", "bytes", 1_500_000),
        ("1.5 mb", "bytes", 1_500_000),
        ("64KiB", "bytes", 65_536),
        ("1GB", "bytes", 10**9),
        ("700B", "bytes", 700),
        ("80%", "parameters", 29_440),
        (" 12.5 % ", "parameters", 4600),
        ("250%", "parameters", 92_000),
        ("ues-12", "parameters", 13_800),
        (" UES-1 ", "parameters", 1150),
    ],
)
def test_a_budget_is_read_in_parameters_bytes_or_percent(text: str, resource: str, limit: int) -> None:
    budget = parse_budget(text, SCHEMA)
    assert (budget.resource, budget.limit, budget.text) == (resource, limit, text)


def test_a_budget_of_a_decimal_fraction_is_exact() -> None:
    """In floats 29 / 100 * 800 and 1.001 * 1000 end just below a whole number."""
    assert all(parse_budget(f"{p}%", small_schema(25)).limit == 800 * p // 100 for p in range(1, 100))
    assert [parse_budget(f"{n / 1000}KB", SCHEMA).limit for n in range(1001, 1100)] == list(range(1001, 1100))


@pytest.mark.parametrize(
    ("text", "precision", "resource", "limit"),
    [
        ("200000", "int8", "parameters", 200_000),
        ("1.5MB", "int8", "served_int8", 1_500_000),
        ("50%", "int8", "served_int8", 1150 * 48 // 2),  # a row of 32 columns takes 36 bytes, rounded up to 48
        ("ues-12", "int8", "served_int8", 1150 * 16),
        ("ues-13", "int8", "served_int8", 1150 * 32),
        ("ues-24", "int4", "served_int4", 1150 * 16),
        ("ues-8", "fp16", "served_fp16", 1150 * 16),
        ("100%", "fp32", "served_fp32", 1150 * 128),
    ],
)
def test_with_a_precision_budgets_count_bytes_as_served(text: str, precision: str, resource: str, limit: int) -> None:
    budget = parse_budget(text, SCHEMA, precision=precision)
    assert (budget.resource, budget.limit, budget.text) == (resource, limit, text)


@pytest.mark.parametrize(
    "text",
    ["", "much", "ues-0", "ues-", "ues12", "MB", "-5", "10TB", "5 apples", "1.5.2MB", "%", "nan", "inf", "1e400"],
)
def test_what_is_no_budget_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(
        UserError, match=r"search.budget.*is not a budget; write 200000 .parameters., 1.5MB, 80% .of UES-32. or ues-12"
    ):
        parse_budget(text, SCHEMA)


@pytest.mark.parametrize("text", ["0", "0MB", "0.0%"])
def test_an_empty_budget_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be above 0"):
        parse_budget(text, SCHEMA)


@pytest.mark.parametrize(
    ("text", "candidates", "least"),
    [
        ("2299", [2, 8], "2,300 parameters"),  # 1150 rows of width 2
        ("18KB", [2, 8], "18,400 bytes"),  # width 2 lives in four columns
        ("99", [0, 2, 8], "100 parameters"),  # all fields but the smallest may be dropped
    ],
)
def test_a_budget_below_the_narrowest_allocation_names_the_least_size(
    text: str, candidates: list[int], least: str
) -> None:
    with pytest.raises(UserError, match=f"search.budget: '{text}'.*narrowest allocation.*needs {least}"):
        check_feasible(parse_budget(text, SCHEMA), SCHEMA, candidates)


def test_a_budget_of_just_the_narrowest_allocation_is_feasible() -> None:
    check_feasible(parse_budget("2300", SCHEMA), SCHEMA, [2, 8])
    check_feasible(parse_budget("18400B", SCHEMA), SCHEMA, [2, 8])
    check_feasible(parse_budget("100", SCHEMA), SCHEMA, [0, 2, 8])


def test_cost_tables_count_each_resource() -> None:
    assert cost_table(SCHEMA, [0, 2, 8], "widths").tolist() == [[0, 2, 8]] * 3
    assert cost_table(SCHEMA, [0, 2, 8], "parameters").tolist()[1] == [0, 200, 800]
    assert cost_table(SCHEMA, [0, 2, 8], "bytes").tolist()[1] == [0, 1600, 3200]
    assert cost_table(SCHEMA, [0, 12, 13, 28, 29], "served_int8").tolist()[1] == [0, 1600, 3200, 3200, 4800]
    assert total_cost([2, 1, 0], cost_table(SCHEMA, [0, 2, 8], "parameters")) == 8200


def test_a_weight_per_value_counts_in_costs_and_budgets() -> None:
    assert cost_table(SCHEMA, [0, 2, 8], "parameters", 1).tolist()[1] == [0, 300, 900]
    assert cost_table(SCHEMA, [0, 2, 8], "bytes", 1).tolist()[1] == [0, 1600, 4800]
    assert cost_table(SCHEMA, [0, 2, 8], "widths", 1).tolist() == [[0, 2, 8]] * 3
    assert parse_budget("50%", SCHEMA, extra=1).limit == 33 * parse_budget("50%", SCHEMA).limit // 32
    least = "3450"  # 3 columns of 1,150 rows
    check_feasible(parse_budget(least, SCHEMA), SCHEMA, [2, 8], extra=1)
    with pytest.raises(UserError, match="needs 3,450 parameters"):
        check_feasible(parse_budget("3449", SCHEMA), SCHEMA, [2, 8], extra=1)


def test_relative_costs_keep_the_mean_of_the_widths() -> None:
    for resource in ("widths", "parameters", "bytes"):
        costs = relative_costs(SCHEMA, [0, 4, 8], resource)
        torch.testing.assert_close(costs.mean(0), torch.tensor([0.0, 4.0, 8.0]))


def brute_force(scores: torch.Tensor, costs: torch.Tensor, limit: float) -> float | None:
    fields, candidates = scores.shape
    best = None
    for choice in itertools.product(range(candidates), repeat=fields):
        if total_cost(choice, costs) <= limit:
            value = float(sum(scores[f, j] for f, j in enumerate(choice)))
            best = value if best is None else max(best, value)
    return best


@pytest.mark.parametrize("case", range(60))
def test_the_knapsack_equals_brute_force(case: int) -> None:
    rng = np.random.default_rng(case)
    fields, candidates = int(rng.integers(1, 6)), int(rng.integers(2, 5))
    rows = rng.integers(1, [10, 1000, 10**7][case % 3], fields)
    widths = np.sort(rng.choice(np.arange(65), candidates, replace=False))
    costs = torch.from_numpy(np.outer(rows, widths)).double()
    scores = torch.from_numpy(rng.normal(size=(fields, candidates))).double()
    if case % 5 == 0:
        scores = scores.round()  # ties
    least, most = float(costs.min(1).values.sum()), float(costs.max(1).values.sum())
    limit = float(np.floor(least + rng.random() * (most - least)))
    choice = knapsack(scores, costs, limit)
    assert total_cost(choice, costs) <= limit
    value = float(sum(scores[f, j] for f, j in enumerate(choice)))
    assert value == pytest.approx(brute_force(scores, costs, limit), abs=1e-9)


def test_the_knapsack_meets_a_limit_to_the_last_unit() -> None:
    # Limits that one choice meets exactly: the solver's tolerance must neither lose nor overshoot it.
    costs = torch.tensor([[0.0, 12_345_678.0], [0.0, 1.0], [0.0, 999.0]]).double()
    scores = torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 3.0]]).double()
    assert knapsack(scores, costs, 12_346_678) == [1, 1, 1]
    assert knapsack(scores, costs, 12_346_677) == [1, 0, 1]
    assert knapsack(scores, costs, 12_346_676) == [1, 1, 0]


def test_a_knapsack_nothing_fits_into_is_an_error() -> None:
    with pytest.raises(ValueError, match="no choice costs at most 3"):
        knapsack(torch.zeros(2, 2), torch.tensor([[2.0, 4.0], [2.0, 4.0]]), 3)


def test_a_large_knapsack_is_quick_and_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    costs = torch.from_numpy(np.outer(rng.integers(1, 10**6, 40), [0, 2, 8, 16, 32, 64])).double()
    scores = torch.from_numpy(rng.normal(size=(40, 6)))
    limit = 0.2 * float(costs[:, -1].sum())
    assert total_cost(knapsack(scores, costs, limit), costs) <= limit


def test_a_large_knapsack_of_many_fields_is_exact_in_its_masked_candidates() -> None:
    rng = np.random.default_rng(1)
    costs = torch.from_numpy(np.outer(rng.integers(1, 10**6, 1200), [0, 2, 8, 16, 32])).double()
    scores = torch.from_numpy(rng.normal(size=(1200, 5)))
    masked = torch.from_numpy(rng.random((1200, 5)) < 0.3)
    masked[:, 0] = False
    limit = 0.2 * float(costs[:, -1].sum())
    choice = knapsack(scores.masked_fill(masked, -np.inf), costs, limit)
    assert total_cost(choice, costs) <= limit
    assert not masked[np.arange(1200), choice].any()
    # No single exchange that fits is better.
    spare = limit - total_cost(choice, costs)
    own_cost, own_score = (x[np.arange(1200), choice][:, None] for x in (costs, scores))
    assert not ((scores > own_score) & (costs - own_cost <= spare) & ~masked).any()


def test_the_knapsack_may_spend_the_budget_to_the_last_unit() -> None:
    """400/400 + 160/400 and 560/400 round differently."""
    scores = torch.tensor([[0.73, 0.75, 0.76], [0.70, 0.73, 0.76]])
    costs = torch.tensor([[0.0, 200, 400], [0, 80, 160]], dtype=torch.float64)
    assert knapsack(scores, costs, 560) == [2, 2]
    assert knapsack(scores, costs, 559) == [1, 2]


def test_scores_that_are_all_tiny_are_told_apart_as_well() -> None:
    """Gates that have learned to drop all fields keep probabilities far below the solver's tolerance."""
    scores = torch.tensor([[0, 1], [0, 8], [0, 7], [0, 5]], dtype=torch.float64)
    costs = torch.tensor([[0, 1], [0, 10], [0, 6], [0, 4]], dtype=torch.float64)
    for scale in (1.0, 1e-3, 1e-7, 1e-12, 1e-200):
        assert knapsack(scores * scale, costs, 10) == [0, 0, 1, 1], scale
