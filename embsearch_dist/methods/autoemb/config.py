"""Settings of AutoEmb (Zhao et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import check_table_candidates
from embsearch_dist.methods.budget_options import BudgetOptions
from embsearch_dist.methods.gated.config import OuterConfig, PopularityConfig


@dataclass
class AutoEmbConfig(BudgetOptions):
    """AutoEmb: widths weighed by the popularity of values."""

    candidates: list[int] = option(
        [2, 4, 8, 16, 32], "candidate widths, ascending, the widest a multiple of 4; a leading 0 may drop fields"
    )
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(pretrain_epochs=0.0, every=1))

    def check(self) -> None:
        super().check()
        check_table_candidates(self.candidates)
