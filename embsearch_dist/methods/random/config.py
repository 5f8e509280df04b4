"""Settings of widths drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option, require
from embsearch_dist.config.widths import check_candidates
from embsearch_dist.methods.budget_options import BUDGET_HELP, PRECISION_HELP, check_precision


@dataclass
class RandomConfig:
    """Random widths: the exact knapsack under the budget, with scores that mean nothing."""

    name: str = option("random", "name of the result among the allocations of the run directory")
    candidates: list[int] = option([0, 2, 4, 8, 16, 32], "candidate widths, ascending; a leading 0 may drop fields")
    budget: str = option("", BUDGET_HELP)
    precision: str = option("", PRECISION_HELP)
    pareto: list[str] = option([], "further budgets to draw allocations for, e.g. [20%, 40%, 80%]")

    def check(self) -> None:
        check_candidates(self.candidates)
        check_precision(self.precision)
        require(bool(self.name) and "/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")
