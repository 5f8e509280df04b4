"""Settings of PEP (Liu et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.budget_options import BudgetOptions

GRANULARITIES = ("field_dim", "field", "dim", "global")


@dataclass
class PEPConfig(BudgetOptions):
    """PEP: thresholds on single entries, learned with the tables."""

    width: int = option(32, "width of every field of the model that is pruned", low=1)
    granularity: str = option(
        "field_dim", "a threshold for each: field_dim (field and column) | field | dim | global", choices=GRANULARITIES
    )
    start: float = option(-7.0, "s at the start; the threshold is sigmoid(s). -15 as published for MovieLens")
    lr: float = option(1e-2, "learning rate of s", above=0)
    keep: float = option(0.9, "without a budget: share of the summed column shares that is kept", above=0, high=1)
    tickets: bool = option(False, "train each mask again from the initial tables; figures in search/ticket-NAME.json")
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))

    @property
    def candidates(self) -> list[int]:
        """All widths that a choice of columns can give."""
        return list(range(self.width + 1))
