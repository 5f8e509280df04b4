"""Settings of the baselines that cut a trained model down by its tables alone."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option, require
from embsearch_dist.methods.budget_options import BUDGET_HELP, PRECISION_HELP, check_precision

RULES = ("fdo", "magnitude")


@dataclass
class TruncationConfig:
    """Truncation: widths by variance (FDO) or by magnitude from one trained uniform model. Baselines."""

    name: str = option("", "name of this search's result; empty = that of the rule")
    rule: str = option(
        "fdo", "fdo (PCA per field, GDCN) | magnitude (the largest columns of all tables)", choices=RULES
    )
    width: int = option(32, "width of every field of the model that is trained and cut down; GDCN takes 16", low=1)
    keep: float = option(0.95, "without a budget: share of a field's variance, or of all squared magnitudes, kept")
    weighted: bool = option(False, "count a row as often as training looks it up; false = once, as published")
    rows: int = option(50_000, "rows drawn: of training for weights, of validation for the figures shown", low=1)
    budget: str = option("", BUDGET_HELP)
    precision: str = option("", PRECISION_HELP)
    pareto: list[str] = option([], "further budgets to derive allocations for, e.g. [20%, 40%, 80%]")

    def check(self) -> None:
        check_precision(self.precision)
        require(0 < self.keep <= 1, "search.keep", f"must be above 0 and at most 1, got {self.keep}")
        require("/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")

    @property
    def result(self) -> str:
        """The name of the result."""
        return self.name or self.rule

    @property
    def candidates(self) -> list[int]:
        """All widths that the rule can give: FDO drops no field."""
        return list(range(0 if self.rule == "magnitude" else 1, self.width + 1))
