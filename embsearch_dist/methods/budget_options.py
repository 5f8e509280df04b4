"""Options of budgets: what a user may write, and the section that searches ending with widths have in common."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import one_of, option, require
from embsearch_dist.precision import MIXED, PRECISIONS

BUDGET_HELP = (
    "hard bound on the tables: '200000' parameters, '1.5MB', '80%' of UES-32, or 'ues-12': what that width takes"
)
PRECISION_HELP = "MB, % and ues-N count bytes served at fp32|fp16|int8|int4|mixed (a field's own); empty = as trained"


def check_precision(precision: str) -> None:
    """Of the key ``search.precision``."""
    one_of("search.precision", precision, ("", *PRECISIONS, MIXED))


@dataclass
class BudgetOptions:
    """A result's name and the budgets it is found under; base of a method's ``search`` section.

    The section has ``candidates`` too, an option or a property: the widths that a field may get.
    """

    name: str = option("", "name of the result among the allocations of the run directory; empty = the method's")
    budget: str = option("", BUDGET_HELP)
    precision: str = option("", PRECISION_HELP)
    pareto: list[str] = option([], "further budgets to derive allocations for, e.g. [20%, 40%, 80%]")

    def check(self) -> None:
        check_precision(self.precision)
        require("/" not in self.name, "search.name", f"must be a plain word, got {self.name!r}")
