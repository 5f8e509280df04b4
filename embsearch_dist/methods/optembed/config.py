"""Settings of OptEmbed (Lyu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.budget_options import BudgetOptions


@dataclass
class EvolutionConfig:
    """The evolution over widths; numbers as published."""

    generations: int = option(30, "rounds of parents and children", low=1)
    mutations: int = option(10, "children of one parent in a round", low=1)
    crossovers: int = option(10, "children of two parents in a round", low=0)
    keep: int = option(15, "best candidates of all rounds so far that may be parents", low=2)
    probability: float = option(0.1, "with which a mutation redraws the width of a field", above=0, high=1)


@dataclass
class OptEmbedConfig(BudgetOptions):
    """OptEmbed: a supernet of random prefixes, then evolution over widths."""

    width: int = option(32, "d: the widest a field can be", low=1)
    thresholds: bool = option(False, "learn which values keep a row, too: a threshold per field on the size of a row")
    threshold_lr: float = option(3e-4, "learning rate of the thresholds", above=0)
    alpha: float = option(3e-4, "weight of sum exp(-t), which raises the thresholds t", low=0)
    drop: bool = option(False, "widths may be 0, so that fields can be dropped; as published they are at least 1")
    rows: int = option(20_000, "validation rows that score a candidate", low=1)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)

    @property
    def candidates(self) -> list[int]:
        """All widths that a field may get."""
        return list(range(0 if self.drop else 1, self.width + 1))
