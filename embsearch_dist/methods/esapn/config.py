"""Settings of ESAPN (Liu et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.config.widths import check_table_candidates
from embsearch_dist.methods.budget_options import BudgetOptions
from embsearch_dist.methods.gated.config import OuterConfig, PopularityConfig

BASELINES = ("rows", "last")


@dataclass
class ESAPNConfig(BudgetOptions):
    """ESAPN: policies enlarge fields by the popularity of their values."""

    candidates: list[int] = option(
        [2, 4, 8, 16, 32], "candidate widths, ascending, at least 1, the widest a multiple of 4"
    )
    start: float = option(-1.0, "logit of enlarging, of every size at the start")
    ahead: float = option(0.5, "share of the rows that train a field's columns of the next size", above=0, high=1)
    baseline: str = option(
        "rows",
        "of the reward: rows (the same rows at the present sizes) | last (mean of the last five held-out losses)",
        choices=BASELINES,
    )
    popularity: PopularityConfig = field(default_factory=PopularityConfig)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(pretrain_epochs=0.5, every=1, lr=1e-4))

    def check(self) -> None:
        super().check()
        check_table_candidates(self.candidates)
        require(self.candidates[0] > 0, "search.candidates", "sizes grow from the first one, which must be at least 1")
        require(len(self.candidates) > 1, "search.candidates", "must be at least two, or nothing can grow")
        require(self.start <= 0, "search.start", f"must be at most 0, or every field grows at once, got {self.start:g}")
