"""Settings of MDE (Ginart et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from embsearch_dist.config.options import option
from embsearch_dist.methods.budget_options import BudgetOptions

ROUNDINGS = ("integer", "power2")


@dataclass
class MDEConfig(BudgetOptions):
    """Mixed dimensions: width = base * (ids a row / values of the field)^alpha. Needs no training to search."""

    alpha: float = option(0.3, "power of a field's popularity: 0 = uniform widths, 1 = in proportion to it", low=0)
    width: int = option(32, "largest width; without a budget the width of the field of fewest values", low=1)
    rounding: str = option(
        "integer",
        "widths are integer (nearest whole number) | power2 (nearest power of two)",
        choices=ROUNDINGS,
    )

    @property
    def candidates(self) -> list[int]:
        """All widths that the rule can give, ascending; it drops no field."""
        whole = list(range(1, self.width + 1))
        return whole if self.rounding == "integer" else [w for w in whole if w & (w - 1) == 0]
