"""Settings of OptFS (Lyu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

from embsearch_dist.config.options import option, require
from embsearch_dist.config.sections import TrainConfig
from embsearch_dist.methods.budget_options import BudgetOptions


@dataclass
class OptFSConfig(BudgetOptions):
    """OptFS: a gate for each value of each field, learned with the tables."""

    width: int = option(16, "width of every field, in the search and in its result; 16 as published", low=1)
    lr: float = option(1e-2, "learning rate of the gates", above=0)
    penalty: float = option(0.02, "lambda: weight of the sum of all gates; higher shuts more of them", low=0)
    tau: float = option(200.0, "of the last epoch; it grows from 1, and gates with it from soft to hard", low=1)
    rewind: int = option(0, "retraining begins with the weights after so many epochs of the search; 0: new ones", low=0)
    training: TrainConfig = field(default_factory=lambda: TrainConfig(batch_size=2048, epochs=8, patience=0))

    def check(self) -> None:
        super().check()
        last = self.training.epochs - 1
        require(self.rewind <= last, "search.rewind", f"must be at most {last}, an epoch less than are trained")

    @property
    def candidates(self) -> list[int]:
        """Widths that a field may get: dropped, or that of all."""
        return [0, self.width]
