"""Settings of DNIS, AutoSrh (Cheng et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import check_table_width
from embsearch_dist.methods.budget_options import BudgetOptions
from embsearch_dist.methods.gated.config import MOST, OuterConfig


@dataclass
class AutoSrhConfig(BudgetOptions):
    """DNIS: weights of columns for groups of values that are met equally often."""

    width: int = option(32, "d: width of every field in the search")
    groups: int = option(24, "frequency groups, one for each doubling of a value's count", low=2, high=MOST)
    l1: float = option(1e-5, "penalty on the sizes of the weights in held-out steps", low=0)
    keep: float = option(0.9, "without a budget: share of the summed column scores that is kept", above=0, high=1)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(pretrain_epochs=1.0, every=1))

    def check(self) -> None:
        super().check()
        check_table_width(self.width)

    @property
    def candidates(self) -> list[int]:
        """All widths that a choice of columns can give."""
        return list(range(self.width + 1))
