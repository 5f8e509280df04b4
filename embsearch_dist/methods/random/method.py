"""Widths drawn at random under a budget. Whoever searches has to beat them."""

from __future__ import annotations

import numpy as np
import torch

from embsearch_dist.allocation import Allocation
from embsearch_dist.files import copy_sealed
from embsearch_dist.methods.base import Method
from embsearch_dist.methods.budget import Budget, cost_table, knapsack
from embsearch_dist.methods.found import budget_told, budgets
from embsearch_dist.methods.random.config import RandomConfig
from embsearch_dist.methods.stages import Stage
from embsearch_dist.run import Run


class DrawStage(Stage[RandomConfig]):
    """Draw an allocation for the budget, and one for each Pareto budget."""

    name = "draw"
    repeatable = True

    def run(self, run: Run[RandomConfig]) -> None:
        run.context.first("writing the allocations", lambda: self._write(run))

    def _write(self, run: Run[RandomConfig]) -> None:
        wanted = budgets_of(run)
        rng = np.random.default_rng(run.config.run.seed)
        for name, budget in wanted:
            draw(run, name, budget, rng).save(run.dir / "allocations" / f"{name}.json")
        copy_sealed(run.dir / "allocations" / f"{wanted[0][0]}.json", run.dir / "allocation.json")


class Random(Method):
    """Random allocation under a budget."""

    config = RandomConfig
    trial = {"search": {"candidates": [0, 2, 4], "pareto": ["60%"]}}

    def stages(self) -> list[Stage]:
        return [DrawStage()]

    def check(self, run: Run) -> None:
        budgets_of(run)


def budgets_of(run: Run[RandomConfig]) -> list[tuple[str, Budget | None]]:
    search = run.config.search
    return budgets(search, search.name, run.schema, run.config.model.extra)


def draw(run: Run[RandomConfig], name: str, budget: Budget | None, rng: np.random.Generator) -> Allocation:
    """The allocation that the knapsack finds for scores from a uniform distribution; without a budget each field's
    best one. At least one field is kept."""
    search, schema, extra = run.config.search, run.schema, run.config.model.extra
    costs = cost_table(schema, search.candidates, budget.resource if budget else "parameters", extra)
    limit = budget.limit if budget else float(costs.sum())
    choice = [0] * len(schema.fields)
    while not any(search.candidates[k] for k in choice):
        choice = knapsack(torch.from_numpy(rng.random(tuple(costs.shape))), costs, limit)
    widths = {n: search.candidates[k] for n, k in zip(schema.names, choice, strict=True)}
    told = {"method": "random", "name": name, "seed": run.config.run.seed, **budget_told(budget, search.precision)}
    return Allocation(schema, widths, told, extra)
